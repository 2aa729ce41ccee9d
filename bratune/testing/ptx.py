"""The text of a compiled kernel for NVIDIA GPUs (PTX), read as a program.

`parse` reads what Triton's compiler writes: one entry, its parameters, instructions with their operands and
guards, labels. `bratune.testing.ptx_machine` executes it.

Source: PTX ISA, the reference of NVIDIA.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bratune.errors import MeasureError

__all__ = ["Address", "Instruction", "Program", "parse"]

_COMMENT = re.compile(r"//[^\n]*")
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,]*?(\w+_param_\d+)")
_LABEL = re.compile(r"(\$?[\w$]+):\s*")
_GUARD = re.compile(r"@(!?)(%\w+)\s+")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_REGISTERS = re.compile(r"\.reg\s+\.\w*?(\d+|pred)\s+(%\w+)<")


@dataclass(frozen=True)
class Address:
    """``[base + offset]``: base is a register, a parameter or the name of shared memory."""

    base: str
    offset: int


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: What is between the dots: ``("ld", "shared", "v4", "b32")``.
        operands: In order; those in braces are tuples.
        guard: The register of the predicate; empty where it always runs.
        negated: Whether it runs where the predicate is off.
        text: As it was written.
    """

    opcode: tuple[str, ...]
    operands: tuple[str | tuple[str, ...] | Address, ...]
    guard: str
    negated: bool
    text: str


@dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes:
        name: Of its entry.
        parameters: Names and types, e.g. ``("kernel_param_0", "u64")``, in order.
        instructions: In order.
        labels: Where to go for a label: an index of ``instructions``.
        registers: Bits of the registers by the letters of their names, 1 for predicates: ``{"%r": 32}``.
    """

    name: str
    parameters: tuple[tuple[str, str], ...]
    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]
    registers: Mapping[str, int]

    def without(self, index: int) -> Program:
        """The same program with one instruction left out: nothing happens in its place."""
        found = list(self.instructions)
        found[index] = Instruction(("nop",), (), "", False, f"without {found[index].text}")
        return Program(self.name, self.parameters, tuple(found), self.labels, self.registers)

    def with_text(self, index: int, text: str) -> Program:
        """The same program with another instruction in the place of one."""
        found = list(self.instructions)
        found[index] = _instruction(text)
        return Program(self.name, self.parameters, tuple(found), self.labels, self.registers)


def parse(text: str) -> Program:
    """The program of a kernel's PTX.

    Raises:
        MeasureError: it has no entry, or a branch goes nowhere.
    """
    text = _COMMENT.sub("", text)
    entry = _ENTRY.search(text)
    if not entry:
        raise MeasureError("this text has no .entry: it is not the PTX of a kernel")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in _statements(text[entry.end() :]):
        if isinstance(statement, Instruction):
            instructions.append(statement)
        else:
            labels[statement] = len(instructions)
    for found in instructions:
        if found.opcode[0] == "bra" and found.operands[0] not in labels:
            raise MeasureError(f"{found.text!r} goes to a label that is not there")
    return Program(
        name=entry[1],
        parameters=tuple((name, kind) for kind, name in _PARAMETER.findall(entry[2])),
        instructions=tuple(instructions),
        labels=labels,
        registers={name: 1 if bits == "pred" else int(bits) for bits, name in _REGISTERS.findall(text)},
    )


def _statements(body: str) -> Iterator[Instruction | str]:
    """Instructions, and labels as strings, up to the brace that closes the entry."""
    start = body.index("{") + 1
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(body[end], 0)
        end += 1
    # Directives of debug information stand on lines of their own.
    lines = (line.strip() for line in body[start : end - 1].splitlines())
    code = " ".join(line for line in lines if line and not re.match(r"\.(loc|file|b\d+|section|reg)\b", line))
    for statement in code.split(";"):
        rest = statement.strip()
        while rest:
            if label := _LABEL.match(rest):
                yield label[1]
                rest = rest[label.end() :]
            elif rest[0] in "{}":  # a block of inline assembly
                rest = rest[1:].lstrip()
            elif rest[0] == ".":
                break
            else:
                yield _instruction(rest)
                break


def _instruction(text: str) -> Instruction:
    guard = _GUARD.match(text)
    rest = text[guard.end() :] if guard else text
    opcode, _, operands = rest.partition(" ") if "\t" not in rest else rest.partition("\t")
    return Instruction(
        opcode=tuple(part for part in re.split(r"[.:]+", opcode.strip()) if part),
        operands=tuple(_operand(x) for x in _split(operands)),
        guard=guard[2] if guard else "",
        negated=bool(guard and guard[1]),
        text=" ".join(text.split()),
    )


def _split(operands: str) -> Iterator[str]:
    """At the commas outside of braces and brackets."""
    for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands):
        if part.strip():
            yield part.strip()


def _operand(text: str) -> str | tuple[str, ...] | Address:
    if text.startswith("{"):
        return tuple(name.strip() for name in text.strip("{} ").split(","))
    if address := _ADDRESS.fullmatch(text):
        return Address(address[1], int(address[2] or "0", 0))
    return text
