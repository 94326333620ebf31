"""Loops over vectors that LLVM compiles for this processor, where NumPy and BLAS have no fast operation.

A loop is written once as code that writes code: each method of `Code` adds an instruction on vectors of eight numbers,
and `compiled` makes of all of them a function that is called with addresses and sizes, without the GIL. few_rows.py and
files/packed_rows.py hold the loops. This needs llvmlite (pip install 'minilora[fast]') and an x86 processor with AVX2;
without them the same is computed by NumPy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir

EIGHT = 8  # values of a vector
BYTE, INT, LONG, HALF, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
INTS, FLOATS = ir.VectorType(INT, EIGHT), ir.VectorType(FLOAT, EIGHT)
FREE = ("reassoc", "contract", "nsz")  # sums in any order, a product with its sum in one: still NaN where NaN must be
Value = Any  # of an instruction: llvmlite has no types


def runs_here() -> bool:
    """True if this processor has the instructions: vectors of eight, multiply-add, float16 to float32."""
    features = binding.get_host_cpu_features()
    return all(features.get(name) for name in ("avx2", "fma", "f16c"))


class Code(ir.IRBuilder):
    """The instructions of a function under way: llvmlite's own, and those below."""

    @contextmanager
    def loop(self, stop: Value) -> Iterator[Value]:
        """A block that is repeated for i in range(stop); gives i."""
        before, body, after = self.block, self.append_basic_block(), self.append_basic_block()
        self.cbranch(self.icmp_signed("<", LONG(0), stop), body, after)
        self.position_at_end(body)
        i = self.phi(LONG)
        i.add_incoming(LONG(0), before)
        yield i
        following = self.add(i, LONG(1))
        i.add_incoming(following, self.block)
        self.cbranch(self.icmp_signed("<", following, stop), body, after)
        self.position_at_end(after)

    def at(self, pointer: Value, i: Value) -> Value:
        """The address of element i."""
        return self.gep(pointer, [LONG(i) if isinstance(i, int) else i])

    def read(self, pointer: Value, kind: Any) -> Value:
        """What is stored at an address, which may be any."""
        value = self.load(self.bitcast(pointer, kind.as_pointer()))
        value.align = 1
        return value

    def write(self, value: Value, pointer: Value) -> None:
        """Store a value at an address, which may be any."""
        self.store(value, self.bitcast(pointer, value.type.as_pointer()), align=1)

    def lanes(self, v: Value, *indices: int) -> Value:
        """A vector of these elements of v."""
        return self.shuffle_vector(v, v, ir.Constant(ir.VectorType(INT, len(indices)), indices))

    def everywhere(self, value: Value) -> Value:
        """A vector of one float."""
        first = self.insert_element(ir.Constant(FLOATS, ir.Undefined), value, INT(0))
        return self.lanes(first, *[0] * EIGHT)

    def times(self, a: Value, b: Value) -> Value:
        """a b, of floats."""
        return self.fmul(a, b, flags=FREE)

    def plus(self, a: Value, b: Value) -> Value:
        """a + b, of floats."""
        return self.fadd(a, b, flags=FREE)

    def total(self) -> Value:
        """A place in memory for a vector of sums, zero at first; LLVM keeps it in a register."""
        with self.goto_entry_block():
            place = self.alloca(FLOATS)
        self.store(floats(0.0), place)
        return place

    def add_to(self, total: Value, value: Value) -> None:
        """total += value"""
        self.store(self.plus(self.load(total), value), total)

    def sum(self, total: Value) -> Value:
        """The sum of a vector's eight values."""
        v = self.load(total)
        for half in (4, 2, 1):
            v = self.plus(self.lanes(v, *range(half)), self.lanes(v, *range(half, 2 * half)))
        return self.extract_element(v, INT(0))

    def intrinsic(self, name: str, result: Any, arguments: Sequence[Value]) -> Value:
        """The result of an instruction that only LLVM's own name calls."""
        kind = ir.FunctionType(result, [each.type for each in arguments])
        return self.call(self.module.globals.get(name) or ir.Function(self.module, kind, name), arguments)


def floats(*values: float) -> Value:
    """A constant vector: a value for each place, or one for all."""
    return ir.Constant(FLOATS, list(values) * (EIGHT // len(values)))


def ints(*values: int) -> Value:
    """The same of 32-bit integers, with or without a sign."""
    return ir.Constant(INTS, [v - (1 << 32) if v >= 1 << 31 else v for v in values * (EIGHT // len(values))])


def compiled(arguments: int, write: Callable[[Code, Sequence[Value]], None]) -> Callable[..., None]:
    """The function of this many 64-bit integers, addresses and sizes, whose instructions `write` adds."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = ir.Module()
    module.triple = binding.get_default_triple()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [LONG] * arguments), "compiled")
    code = Code(function.append_basic_block())
    write(code, function.args)
    code.ret_void()
    parsed = binding.parse_assembly(str(module))
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(parsed, passes)
    engine = binding.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(engine.get_function_address("compiled"))
    call.engine = engine  # type: ignore[attr-defined]  # its memory holds the instructions
    return call
