"""Recorded functions of Triton's language give the interpreter's own results, bit for bit."""

import itertools

import numpy as np
import pytest
import triton.language as tl
from recorded_calls import RecordedCalls
from triton.runtime import interpreter

DTYPES = (tl.float32, tl.float16, tl.bfloat16, tl.int32, tl.uint32, tl.int64, tl.int1, tl.int8)
SHAPES = (((8,), (8,)), ((4, 1), (1, 8)), ((4, 8), ()), ((), (8,)), ((), ()), ((8,), (4, 1)))
OPERATORS = [
    "add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "lt", "le", "gt", "ge",
    "eq", "ne", "lshift", "rshift",
]  # fmt: skip
NUMBERS = [2, -2, 0, True, 2.5, 0.0, -0.0, tl.constexpr(3), 2**40]


@pytest.fixture
def calls():
    """Recordings of this test alone, where types are the interpreter's."""
    scope = interpreter._LangPatchScope()
    interpreter._patch_lang_core(tl, scope)
    yield RecordedCalls(interpreter)
    scope.restore()


def tensor(dtype, *shape, seed=0):
    """Numbers of any sign, zeros among them; of no shape, a scalar."""
    numbers = np.random.default_rng(seed).integers(-3 * (dtype != tl.uint32), 4, shape or (1,))
    data = numbers.astype(interpreter._get_np_dtype(dtype))
    kind = tl.block_type(dtype, list(shape)) if shape else dtype
    return tl.tensor(interpreter.TensorHandle(data, dtype), kind)


def described(made):
    kind = made.type.name, str(made.dtype), [int(n) for n in made.shape], int(made.numel)
    return *kind, made.handle.dtype.name, made.handle.data.dtype, made.handle.data.tobytes()


def result_of(function, *args, **kwargs):
    """Everything that a result is, or the refusal."""
    with np.errstate(all="ignore"):
        try:
            made = function(*args, **kwargs)
        except Exception as refusal:
            return type(refusal), str(refusal)
    return [described(one) for one in (made if isinstance(made, tuple) else (made,))]


def agree(calls, function, *several):
    """The results of several arguments, the first of any types being recorded."""
    recorded = calls.of(function)
    plain = [result_of(function, *args, _semantic=interpreter.interpreter_semantic)
             for args in several]  # fmt: skip
    assert [result_of(recorded, *args) for args in several] == plain
    return plain


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(calls, name):
    function = getattr(tl.tensor, f"__{name}__")
    kinds = [(a, b) for a in DTYPES for b in DTYPES if a is b or {a, b} & {tl.float32, tl.int32}]
    worked = 0
    for (a, b), (left, right) in itertools.product(kinds, SHAPES):
        several = [(tensor(a, *left, seed=s), tensor(b, *right, seed=s + 9)) for s in range(3)]
        worked += type(agree(calls, function, *several)[0]) is list
    assert worked >= 50 and sum(map(bool, calls._found.values())) == worked


@pytest.mark.parametrize("name", ["add", "rsub", "mul", "truediv", "and", "le", "eq"])
def test_numbers(calls, name):
    function = getattr(tl.tensor, f"__{name}__")
    for number, dtype, shape in itertools.product(NUMBERS, DTYPES, ((8,), ())):
        agree(calls, function, *[(tensor(dtype, *shape, seed=seed), number) for seed in range(3)])


def test_numbers_that_are_equal_are_not_the_same(calls):
    values = (1, True, 1.0, 0.0, -0.0, float("nan"), float("nan"), 0, False)
    agree(calls, tl.full, *[([4], value, tl.float32) for value in values])
    agree(calls, tl.tensor.__add__, *[(tensor(tl.int32, 4), value) for value in values])


def test_a_tensor_beside_itself_is_no_other_one(calls):
    one, other = tensor(tl.float32, 8), tensor(tl.float32, 8, seed=1)
    itself, others = agree(calls, tl.tensor.__sub__, (one, one), (one, other))
    assert itself != others


@pytest.mark.parametrize("left, right", [((8,), (8,)), ((), (8,))], ids=["blocks", "scalar"])
def test_what_a_comparison_leaves_is_looked_at(calls, left, right):
    """The interpreter keeps the type of what was compared, and spreads a scalar out as that."""

    def less(kind, shape):
        pair = tensor(kind, *shape), tensor(kind, *shape, seed=1)
        return tl.tensor.__lt__(*pair, _semantic=interpreter.interpreter_semantic)

    kinds = (tl.int32, tl.int8, tl.int64, tl.float32, tl.int32)
    found = agree(calls, tl.tensor.__and__, *[(less(k, left), less(k, right)) for k in kinds])
    assert found[0] != found[1]
    plain = tensor(tl.int1, *left), tensor(tl.int1, *right)
    agree(calls, tl.tensor.__or__, plain, *[(less(kind, left), plain[1]) for kind in kinds])
    agree(calls, tl.tensor.__xor__, plain, *[(plain[0], less(kind, right)) for kind in kinds])
    turned = plain[::-1]
    agree(calls, tl.tensor.__or__, turned, *[(less(kind, right), turned[1]) for kind in kinds])
    agree(calls, tl.tensor.__xor__, turned, *[(turned[0], less(kind, left)) for kind in kinds])


def test_casts_and_shapes(calls):
    for a, b in itertools.product(DTYPES, DTYPES):
        agree(calls, tl.cast, *[(tensor(a, 4, 2, seed=seed), b) for seed in range(3)])
    blocks = [tensor(tl.float32, 4, 2, seed=seed) for seed in range(3)]
    several = [tensor(tl.int1, 4, 2, seed=seed) for seed in range(3)]
    agree(calls, tl.expand_dims, *[(block, 1) for block in blocks])
    agree(calls, tl.reshape, *[(block, [2, 4]) for block in blocks])
    agree(calls, tl.permute, *[(block, (1, 0)) for block in blocks])
    agree(calls, tl.split, *[(block,) for block in blocks])
    agree(calls, tl.tensor.__getitem__, *[(b, (slice(None), None, slice(None))) for b in blocks])
    agree(calls, tl.broadcast_to, *[(tensor(tl.int8, 4, 1, seed=s), [4, 8]) for s in range(3)])
    agree(calls, tl.arange, (0, 4), (0, 8), (0, 4))
    agree(calls, tl.where, *[(few, b, 0.5) for few, b in zip(several, blocks, strict=True)])
    agree(calls, tl.maximum, *zip(blocks, blocks[::-1], strict=True))
    halves = [[tensor(tl.float16, *size, seed=s) for size in ((4, 8), (8, 2))] for s in range(3)]
    agree(calls, tl.dot, *halves)


def test_memory_is_read_as_it_is_now(calls):
    memory, pointer = np.arange(8, dtype=np.float32), tl.pointer_type(tl.float32)
    address = np.array([memory.ctypes.data], np.uint64)
    base = tl.tensor(interpreter.TensorHandle(address, pointer), pointer)
    plus, load, store = map(calls.of, (tl.tensor.__add__, tl.load, tl.store))
    few, given = tensor(tl.int1, 8), [tensor(tl.float32, 8, seed=seed) for seed in range(3)]
    few.handle.data[:] = [True, False] * 4
    for number in range(3):
        places = plus(base, calls.of(tl.arange)(0, 8))
        assert load(places).handle.data.tolist() == memory.tolist()
        read = load(places, mask=few, other=-1.0).handle.data
        assert read.tolist() == np.where(few.handle.data, memory, -1).tolist()
        store(places, given[number], mask=few)
        assert memory[::2].tolist() == given[number].handle.data[::2].tolist()
        assert memory[1::2].tolist() == [1, 3, 5, 7]


def test_a_program_is_the_one_that_runs(calls):
    builder, program = interpreter.interpreter_builder, calls.of(tl.program_id)
    builder.set_grid_dim(4, 1, 1)
    for number in range(3):
        builder.set_grid_idx(number, 0, 0)
        assert program(0).handle.data.tolist() == [number]


def test_constants_are_not_shared(calls):
    made = [calls.of(tl.full)([4], 2, tl.int32) for _ in range(3)]
    assert len({id(one.handle) for one in made}) == 3
