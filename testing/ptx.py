"""PTX text -> programs: instructions with parsed operands, the widths of registers, shared memory.

    parse_kernel(text)               the one .entry of a module, with its parameters
    parse_assembly(text, widths)     a string of inline assembly, whose $0, $1, ... are registers

Registers declared within braces belong to them: they are renamed to name@depth.width, so that scopes which follow each other
share storage. What is left out raises NotImplementedError: local memory, several entries, arrays as parameters, %p|%q with
blanks. Whether an instruction exists is not decided here (instructions.py). Grammar: PTX ISA 9, Syntax.
"""

import functools
import re
from typing import NamedTuple


class Register(NamedTuple):
    """A register, a special register (%tid.x), or the name of a shared array, which stands for its address."""

    name: str


class Immediate(NamedTuple):
    """An integer, or the bits of a float (0f..., 0d...), whose width is then 32 or 64 and not 0."""

    bits: int
    width: int = 0


class Vector(NamedTuple):
    """{a, b, ...}, the first one in the lowest bits."""

    parts: tuple


class Address(NamedTuple):
    """[base + offset]; `base` is a Register or an Immediate."""

    base: "Operand"
    offset: int


class Pair(NamedTuple):
    """a|b, two destinations."""

    parts: tuple


class Not(NamedTuple):
    """!p"""

    register: "Operand"


class Unknown(NamedTuple):
    """What only instructions that are refused have."""

    text: str


SINK = Unknown("_")
Operand = Register | Immediate | Vector | Address | Pair | Not | Unknown


class Instruction(NamedTuple):
    predicate: str | None
    negated: bool
    opcode: str
    operands: tuple[Operand, ...]
    text: str


class Program(NamedTuple):
    instructions: list[Instruction]  # the operand of a branch is the index of its target
    widths: dict[str, int]  # register -> bits, 1 for a predicate
    shared: dict[str, tuple[int, int]]  # array -> bytes (0: what the launch gives), alignment


class Kernel(NamedTuple):
    name: str
    parameters: list[tuple[str, str]]  # type and name, such as ("u64", "kernel_param_0")
    program: Program
    threads: int | None  # .reqntid


COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
# Directives about debugging, or about limits that do not change what is computed.
LINE = r"\.(?:loc|file|pragma|maxntid|minnctapersm|maxnreg|section|target|version|address_size)\b[^\n;]*"
STATEMENT = re.compile(rf"\s*(?:([{{}};])|([$\w]+):(?!:)|({LINE})|([^;]*);)")
INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)", re.S)
TOKEN = r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^\s,{}\[\]()]+"
TOKENS = re.compile(TOKEN)
OPERANDS = re.compile(rf"(?:(?:{TOKEN})(?:\s*,\s*(?:{TOKEN}))*)?\s*")
REGISTERS = re.compile(r"\.reg\s*(?:\.v\d\s*)?\.(\w+)\s+(.*)", re.S)
SHARED = re.compile(r"\.(?:extern\s+\.)?shared\s*(?:\.align\s+(\d+)\s+)?\.[busf](\d+)\s+([\w$]+)\s*(?:\[(\d*)\])?")
INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
ADDRESS = re.compile(r"\[\s*([%$\w.@]+)\s*(?:\+?\s*(-?\s*\w+))?\s*\]")


class _Parser:
    """One body, top to bottom."""

    def __init__(self, widths: dict[str, int]):
        self.program = Program([], dict(widths), {})
        self.scopes: list[dict] = [{}]  # name -> renamed; ":" and a label -> where it is
        self.branches: list[tuple[int, list[dict]]] = []
        self.known: dict[str, Operand] = {}  # operands of the outermost scope, by their text

    def parse(self, text: str) -> Program:
        position = 0
        text = text.rstrip()
        while position < len(text):
            found = STATEMENT.match(text, position)
            if not found:
                raise NotImplementedError(f"PTX that does not end: {text[position:].strip()[:80]}")
            position = found.end()
            mark, label, line, statement = found.groups()
            if statement:
                self.statement(statement.strip())
            elif mark == "{":
                self.scopes.append({})
            elif mark == "}":
                self.scopes.pop()
            elif label:
                if ":" + label in self.scopes[-1]:
                    raise NotImplementedError(f"label {label} twice")
                self.scopes[-1][":" + label] = len(self.program.instructions)
        for index, scopes in self.branches:
            branch = self.program.instructions[index]
            label = ":" + getattr(branch.operands[0], "name", "")
            target = next((scope[label] for scope in reversed(scopes) if label in scope), None)
            if target is None:
                raise NotImplementedError(branch.text)
            self.program.instructions[index] = branch._replace(operands=(Immediate(target),))
        return self.program

    def statement(self, text: str) -> None:
        if not text.startswith("."):
            self.program.instructions.append(self.instruction(text))
        elif found := REGISTERS.fullmatch(text):
            self.registers(1 if found[1] == "pred" else int(re.sub(r"\D", "", found[1])), found[2])
        elif found := SHARED.fullmatch(text):
            self.program.shared.update(_shared(found))
        else:
            raise NotImplementedError(text)

    def registers(self, width: int, names: str) -> None:
        depth = len(self.scopes) - 1
        for name in map(str.strip, names.split(",")):
            several = re.fullmatch(r"(.*)<(\d+)>", name)
            for each in [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]:
                full = f"{each}@{depth}.{width}" if depth else each
                self.scopes[-1][each] = full
                self.program.widths[full] = width

    def named(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def instruction(self, text: str) -> Instruction:
        found = INSTRUCTION.fullmatch(text)
        if not found or not OPERANDS.fullmatch(found[4]):
            raise NotImplementedError(text)
        negation, predicate, opcode, operands = found.groups()
        parsed = tuple([self.operand(token) for token in TOKENS.findall(operands)])
        if opcode == "bra" or opcode == "bra.uni":
            self.branches.append((len(self.program.instructions), list(self.scopes)))
        return Instruction(predicate and self.named(predicate), bool(negation), opcode, parsed, text)

    def operand(self, text: str) -> Operand:
        if len(self.scopes) > 1:
            return self.parsed(text)
        operand = self.known.get(text)
        if operand is None:
            operand = self.known[text] = self.parsed(text)
        return operand

    def parsed(self, text: str) -> Operand:
        first = text[0]
        if first == "{":
            return Vector(tuple([self.operand(part) for part in TOKENS.findall(text[1:-1])]))
        if first == "[":
            found = ADDRESS.fullmatch(text)
            if not found:
                return Unknown(text)
            return Address(self.operand(found[1]), int((found[2] or "0").replace(" ", ""), 0))
        if text == "_":
            return SINK
        if first == "(":
            return Unknown(text)
        if first == "!":
            return Not(self.operand(text[1:]))
        if "|" in text:
            return Pair(tuple([self.operand(part) for part in text.split("|")]))
        if first.isdigit() or first == "-":
            return _immediate(text)
        return Register(self.named(text))


def _immediate(text: str) -> Operand:
    if INTEGER.fullmatch(text):
        return Immediate(int(text.removesuffix("U"), 0))
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return Immediate(int(text[2:], 16), 32)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return Immediate(int(text[2:], 16), 64)
    return Unknown(text)


def _shared(found: re.Match) -> dict[str, tuple[int, int]]:
    alignment, width, name, count = found.groups()
    size = int(width) // 8
    return {name: (size * int(count or 0) if count is not None else size, int(alignment or size))}


def _parameters(text: str) -> list[tuple[str, str]]:
    found = []
    for each in filter(str.strip, text.split(",")):
        parameter = re.fullmatch(r"\s*\.param\s+\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)\s*", each)
        if not parameter:
            raise NotImplementedError(f"parameter {each.strip()}")
        found.append((parameter[1], parameter[2]))
    return found


@functools.lru_cache(maxsize=8)
def parse_kernel(text: str) -> Kernel:
    """The kernel of a module; it is shared by all who ask for the same text: leave it as it is.

    Raises ValueError unless there is exactly one .entry, NotImplementedError for what the module docstring leaves out.
    """
    text = COMMENT.sub("", text)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*(?:\((.*?)\))?([^{(]*)\{", text, re.S))
    if len(entries) != 1:
        raise ValueError(f"{len(entries)} entries in this PTX, expected 1")
    entry = entries[0]
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, entry.end()):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            break
    program = _Parser({}).parse(text[entry.end() : brace.start()])
    for found in SHARED.finditer(text, 0, entry.start()):
        program.shared.update(_shared(found))
    threads = re.search(r"\.reqntid\s+(\d+)((?:\s*,\s*\d+)*)", entry[3])
    if threads and re.search(r"[02-9]|1\d", threads[2]):
        raise NotImplementedError(threads[0])
    return Kernel(entry[1], _parameters(entry[2] or ""), program, int(threads[1]) if threads else None)


@functools.lru_cache(maxsize=256)
def parse_assembly(text: str, widths: tuple[int, ...]) -> Program:
    """Inline assembly in which $0, $1, ... are registers of those widths, called %op0, %op1, ...; $$ is a dollar sign.

    Raises NotImplementedError for what the module docstring leaves out."""
    text = re.sub(r"\$(\$|\d+)", lambda found: "$" if found[1] == "$" else f"%op{found[1]}", COMMENT.sub("", text)).rstrip()
    names = {f"%op{i}": width for i, width in enumerate(widths)}
    return _Parser(names).parse(text if text.endswith((";", "}")) else text + ";")
