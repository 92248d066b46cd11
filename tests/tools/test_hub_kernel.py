"""The kernels as a Hugging Face kernel project, imported as the package `kernels` does it."""

from __future__ import annotations

import importlib.util
import json
import sys
import tomllib

import pytest
import torch
from sparsek_kernels import sparsek_attention

import hub_kernel


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "sparsek"
    hub_kernel.lay_out(out)
    return out


def check(kernel) -> None:
    """It is another copy of the package, and computes the same."""
    assert kernel.sparsek_attention is not sparsek_attention
    torch.manual_seed(0)
    q, k, v, scores = (torch.randn(1, 2, 40, 8) for _ in range(4))
    q.requires_grad_()
    settings = dict(topk=5, window=4, sinks=1)
    ours, theirs = (f(q, k, v, scores[..., 0], **settings)
                    for f in (kernel.sparsek_attention, sparsek_attention))  # fmt: skip
    assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(x.square().sum(), q)[0] for x in (ours, theirs)]
    assert torch.equal(*grads)
    state = kernel.SparseKState.empty(1, 2, 8, **settings)
    out, state = kernel.sparsek_attention(q.detach(), k, v, scores[..., 0], state=state, **settings)
    torch.testing.assert_close(out, theirs.detach())


def test_it_loads_by_path_under_any_name(project, monkeypatch):
    """What `kernels` does, step by step: it needs no such package."""
    variant = project / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    check(module)
    own = {n for n in sys.modules if n.startswith(f"{name}.")}
    assert f"{name}.attention" in own
    for other in own:
        sys.modules.pop(other)


def test_sources_do_not_name_their_package(project):
    for file in (project / "torch-ext").rglob("*.py"):
        text = file.read_text()
        assert "from sparsek_kernels" not in text and "import sparsek_kernels" not in text, file
        assert 'files("sparsek' not in text and '"sparsek::' not in text, file


def test_the_builder_knows_what_to_build(project):
    general = tomllib.loads((project / "build.toml").read_text())["general"]
    assert general["name"] == "sparsek" and general["version"] == 1
    assert general["edition"] == 5  # of the file's own format
    assert (project / "torch-ext" / "sparsek" / "__init__.py").is_file()


def test_a_folder_in_use_is_left_alone(project):
    with pytest.raises(FileExistsError, match="is not empty"):
        hub_kernel.lay_out(project)


def test_the_kernels_package_loads_it(project):
    load = pytest.importorskip("kernels.load", reason="the package kernels is not installed")
    check(load.get_local_kernel(project, backend="cpu"))
