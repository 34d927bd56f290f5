"""PTX text -> a Program: instructions with their operands, labels, widths of registers, sizes of shared variables.

Registers that braces declare belong to these braces: inline assembly declares the same names again and again, so each is
renamed to one of its own. Left out: functions other than one entry, initialised data, debug information."""

import re
from collections.abc import Callable
from typing import NamedTuple

SKIPPED = re.compile(r"\.(loc|file|pragma|maxntid|reqntid|minnctapersm|maxnreg|section|target|version|address_size)\b[^\n]*")
LABEL = re.compile(r"([$\w]+):(?!:)")
SPACE = re.compile(r"[\s;]+")


class Instruction(NamedTuple):
    """Operands are tuples, by kind: ("r", register) ("i", bits, width or 0) ("v", parts) ("a", base, offset) ("n", negated)
    ("p2", two destinations) ("_",)."""

    predicate: str | None
    negated: bool
    op: list[str]  # the name and its modifiers
    operands: list[tuple]
    text: str


class Entry(NamedTuple):
    parameters: list[str]
    body: str
    shared: dict[str, int]  # bytes of variables outside of the entry
    threads: int | None  # .reqntid


class Program:
    """registers: widths of those that are there beforehand."""

    def __init__(self, body: str, registers: dict[str, int] | None = None):
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.widths: dict[str, int] = dict(registers or {})
        self.shared: dict[str, int] = {}
        self._parse(body)

    def _parse(self, body: str) -> None:
        scopes: list[dict[str, str]] = [{}]
        opened = at = 0

        def renamed(name: str) -> str:
            return next((scope[name] for scope in reversed(scopes) if name in scope), name)

        while at < len(body):
            if found := SPACE.match(body, at) or SKIPPED.match(body, at):
                at = found.end()
            elif body[at] == "{":
                scopes.append({})
                opened, at = opened + 1, at + 1
            elif body[at] == "}":
                scopes.pop()
                at += 1
            elif found := LABEL.match(body, at):
                self.labels[found[1]] = len(self.instructions)
                at = found.end()
            else:
                end = body.index(";", at)
                statement, at = body[at:end].strip(), end + 1
                if statement.startswith(".reg"):
                    self._declare(statement, scopes, opened)
                elif found := re.match(r"\.(?:shared|extern).*\.align\s+\d+\s+\.b8\s+(\w+)\[(\d*)\]", statement, re.S):
                    self.shared[found[1]] = int(found[2] or 0)
                elif not statement.startswith("."):
                    self.instructions.append(instruction(statement, renamed))

    def _declare(self, statement: str, scopes: list[dict[str, str]], opened: int) -> None:
        kind, names = re.match(r"\.reg\s*(?:\.v\d\s*)?\.(\w+)\s+(.*)", statement, re.S).groups()
        for name in map(str.strip, names.split(",")):
            many = re.match(r"(.*)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                own = one if len(scopes) == 1 else f"{one}@{opened}"
                scopes[-1][one] = own
                self.widths[own] = 1 if kind == "pred" else int(re.sub(r"\D", "", kind))


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))


def instruction(statement: str, renamed: Callable[[str], str]) -> Instruction:
    guard = re.match(r"@(!?)([%\w$]+)\s+(.*)", statement, re.S)
    negated, predicate, rest = (bool(guard[1]), renamed(guard[2]), guard[3]) if guard else (False, None, statement)
    name, operands = re.match(r"([\w.:]+)\s*(.*)", rest, re.S).groups()
    return Instruction(predicate, negated, name.split("."), [operand(part, renamed) for part in parts(operands)], statement)


def parts(operands: str) -> list[str]:
    """What commas part outside of brackets."""
    found, depth = [""], 0
    for letter in operands:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return [part.strip() for part in found if part.strip()]


def operand(text: str, renamed: Callable[[str], str]) -> tuple:
    if text.startswith("{"):
        return "v", [operand(part.strip(), renamed) for part in text[1:-1].split(",")]
    if text.startswith("["):
        address = re.match(r"([%$\w.]+)\s*(?:\+\s*(-?\w+))?$", text[1:-1].strip())
        if not address:
            return "a", ("raw", text), 0
        return "a", operand(address[1], renamed), int(address[2] or "0", 0)
    if "|" in text:
        return "p2", [operand(part.strip(), renamed) for part in text.split("|")]
    if text == "_":
        return ("_",)
    if text.startswith("!"):
        return "n", operand(text[1:], renamed)
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        return "i", int(text[2:], 16), 32
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        return "i", int(text[2:], 16), 64
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return "i", int(text.rstrip("U"), 0), 0
    return "r", renamed(text)


def entry(ptx: str) -> Entry:
    """The one entry of a module."""
    text = without_comments(ptx)
    head = re.search(r"\.entry\s+\w+\s*\((.*?)\)(.*?)\{", text, re.S)
    names = re.findall(
        r"\.param\s+\.\w+(?:\s+\.ptr[^,\n]*?)?\s+(?:\.align\s+\d+\s+)?(\w+?)(?:\[\d+\])?\s*(?:,|$)", head[1].replace("\n", " ")
    )
    depth, end = 1, head.end()
    while depth:
        depth += (text[end] == "{") - (text[end] == "}")
        end += 1
    outside = re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d*)\]", text[: head.start()])
    threads = re.search(r"\.reqntid\s+(\d+)", head[2])
    return Entry(names, text[head.end() : end - 1], {n: int(s or 0) for n, s in outside}, int(threads[1]) if threads else None)
