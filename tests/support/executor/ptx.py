"""Read the PTX of one kernel: its parameters, its registers, and its instructions with the source lines they come from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

# Bytes of PTX's types; those of registers are 2, 4 or 8, and 1 stands for a predicate.
SIZES = {
    **dict.fromkeys(("pred", "b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
}

_TOKEN = re.compile(
    r"\s+|//[^\n]*|/\*.*?\*/|(?P<loc>\.loc\b[^\n]*)|(?P<scope>[{}])"
    r"|(?P<label>[\w$]+):(?!:)|(?P<statement>[@.a-zA-Z_][^;]*);",
    re.DOTALL,
)
_STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
_NAME = re.compile(r"[%\w$]+")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


class Unsupported(ValueError):
    """The executor does not know an instruction, a modifier or a form of operand; the message names its line."""


class Parameter(NamedTuple):
    name: str
    type: str
    offset: int


class Statement(NamedTuple):
    line: int  # of the PTX
    source: str  # "file.py:line:column", and where that was inlined
    text: str
    guard: str | None  # the register, as in Kernel.registers
    negated: bool
    opcode: str
    operands: tuple[str, ...]
    scopes: tuple[str, ...]  # innermost first: what is behind the names declared there

    def unsupported(self, what: str) -> Unsupported:
        return Unsupported(f"PTX line {self.line}, {self.source}: {what} in `{self.text}`")


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    threads: int
    statements: list[Statement]
    registers: dict[str, int]  # the bytes of each; 1 of a predicate
    labels: dict[str, int]  # position in statements

    def target(self, branch: Statement) -> int:
        """The position to which this statement branches: of the label in the innermost scope that has it."""
        for scope in branch.scopes:
            if branch.operands[0] + scope in self.labels:
                return self.labels[branch.operands[0] + scope]
        raise branch.unsupported("label")


def parse(ptx: str) -> Kernel:
    head = re.search(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", ptx)
    if head is None:
        raise Unsupported("no .entry in the PTX")
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    if threads is None:
        raise Unsupported("neither .reqntid nor .maxntid")
    kernel = Kernel(head[1], _parameters(head[2]), int(threads[1]), [], {}, {})
    _Body(kernel, ptx, head.end()).read()
    return kernel


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for declaration in filter(None, map(str.strip, text.split(","))):
        found = re.fullmatch(r"\.param\s+\.(\w+)\b.*?([\w$]+)", declaration, re.DOTALL)
        if found is None or found[1] not in SIZES:
            raise Unsupported(f"parameter `{declaration}`")
        size = SIZES[found[1]]
        offset = -(-offset // size) * size
        parameters.append(Parameter(found[2], found[1], offset))
        offset += size
    return parameters


class _Body:
    """The statements between the braces of a kernel."""

    def __init__(self, kernel: Kernel, ptx: str, start: int):
        self.kernel, self.ptx, self.position, self.line = kernel, ptx, start, ptx.count("\n", 0, start) + 1
        # Of the open scopes, innermost first: what is put behind names declared inside, and the registers among them.
        self.scopes: list[tuple[str, dict[str, str]]] = [("", {})]
        self.source = ""

    def read(self) -> None:
        opened = 0
        while self.scopes:
            token = _TOKEN.match(self.ptx, self.position)
            if token is None:
                raise Unsupported(f"PTX line {self.line}: `{self.ptx[self.position :].splitlines()[0]}`")
            if token["loc"]:
                self.source = token["loc"].partition("//")[2].strip() or token["loc"].strip()
            elif token["scope"] == "{":
                opened += 1
                self.scopes.insert(0, (f"${opened}", {}))
            elif token["scope"] == "}":
                del self.scopes[0]
            elif token["label"]:
                self.kernel.labels[token["label"] + self.scopes[0][0]] = len(self.kernel.statements)
            elif token["statement"]:
                self._statement(" ".join(token["statement"].split()))
            self.line += token[0].count("\n")
            self.position = token.end()

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            return self._registers(text)
        if text.startswith(".pragma"):
            return None
        parts = _STATEMENT.fullmatch(text)
        if parts is None or text.startswith("."):
            raise Unsupported(f"PTX line {self.line}, {self.source}: `{text}`")
        negated, guard, opcode, operands = parts.groups()
        guard = guard and self._named(guard)
        if guard and guard not in self.kernel.registers:
            raise Unsupported(f"PTX line {self.line}: predicate {guard} is not declared in `{text}`")
        if len(self.scopes) > 1:
            operands = _NAME.sub(lambda name: self._named(name[0]), operands)
        found = tuple(o.strip() for o in _OPERAND.findall(operands))
        scopes = tuple(suffix for suffix, _ in self.scopes)
        self.kernel.statements.append(
            Statement(self.line, self.source, text, guard, negated == "!", opcode, found, scopes)
        )

    def _named(self, name: str) -> str:
        return next((registers[name] for _, registers in self.scopes if name in registers), name)

    def _registers(self, text: str) -> None:
        found = re.fullmatch(r"\.reg \.(\w+) (.*)", text)
        if found is None or found[1] not in SIZES or (SIZES[found[1]] == 1 and found[1] != "pred"):
            raise Unsupported(f"PTX line {self.line}: `{text}`")
        suffix, declared = self.scopes[0]
        for name in found[2].split(","):
            many = re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", name)
            for each in [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [name.strip()]:
                declared[each] = each + suffix
                self.kernel.registers[each + suffix] = SIZES[found[1]]
