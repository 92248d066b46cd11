"""The memory that vLLM's caches are given on a CPU, where nobody said how much."""

import json

import pytest

from sparsek_cli.serving import room


@pytest.fixture
def on_cpu(all_installed, monkeypatch):
    """vLLM is a build for CPUs; returns what says how many bytes of memory are free."""
    import sparsek_vllm.allocator as allocator

    monkeypatch.setattr(allocator, "on_cpu", lambda: True)
    monkeypatch.delenv(room.ENVIRONMENT, raising=False)
    return lambda free: monkeypatch.setattr(room, "free_memory", lambda: free)


def test_vllm_is_asked_for_the_memory_of_as_many_requests_as_are_under_way(
    sparsek, converted, on_cpu, monkeypatch
):
    """Left alone it wants 92 % of a CPU's memory free."""

    def planned(*flags):
        return json.loads(sparsek("serve", converted, "--dry-run", "--json", "--", *flags).out)

    for free in (1 << 40, None):  # None: nobody says
        on_cpu(free)
        for flags, requests in (
            ([], 128),
            (["-tp", "2"], 256),
            (["--max-num-seqs", "9"], 9),
            (["--num-gpu-blocks-override=9"], 9),
        ):
            plan = planned(*flags)
            assert plan["cache_room_requests"] == requests
            assert plan["cache_room_bytes"] == (requests + 2) * plan["request_bytes"]
            asked = plan["command"].index("--kv-cache-memory-bytes")
            assert plan["command"][asked + 1] == str(plan["cache_room_bytes"])
    assert "for the caches of 128 requests at once" in sparsek("serve", converted, "--dry-run").out
    for flags in (
        ["--gpu-memory-util", "0.5"], ["--kv_cache_memory_bytes=1G"], ["--enable-prefix-caching"],
        ["--max-num-seqs", "many"],
    ):  # fmt: skip
        plan = planned(*flags)
        assert plan["cache_room_bytes"] is None and plan["command"][-len(flags) :] == flags
        assert plan["command"].count("--kv-cache-memory-bytes") == 0
    monkeypatch.setenv(room.ENVIRONMENT, "1")
    assert planned()["cache_room_bytes"] is None


def test_where_memory_is_short_fewer_requests_are_under_way(sparsek, converted, on_cpu):
    on_cpu(None)
    line = ["serve", converted, "--dry-run"]
    cost = json.loads(sparsek(*line, "--json").out)["request_bytes"]
    weights = (converted / "model.safetensors").stat().st_size  # float32, as they are served
    on_cpu(weights + 50 * cost)
    plan = json.loads(sparsek(*line, "--json").out)
    assert 30 < plan["cache_room_requests"] < 40
    assert plan["cache_room_bytes"] < 45 * cost
    assert "others wait" in sparsek(*line).out
    on_cpu(weights + cost)
    shown = sparsek(*line)
    assert shown.failed(2) and "of memory are free" in shown.err and not shown.out
    assert sparsek(*line, "--", "--kv-cache-memory-bytes", "1G").code == 0  # as hinted
    assert sparsek(*line, "--engine", "transformers").code == 0


def test_free_memory_is_the_container_s(monkeypatch, tmp_path):
    monkeypatch.setattr(room, "_GROUPS", tmp_path)
    whole = room.free_memory()
    assert whole is None or whole > 1 << 20
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert room.free_memory() == (None if whole is None else 500)
    (tmp_path / "memory.max").write_text("max\n")
    assert whole is None or room.free_memory() > 1 << 20
