"""The rule of respell for einsums of more than two operands, and in torch's other notations.

An einsum of several operands is contracted in pairs: an activation with a parameter, over the
letters that nothing else has, until no parameter is left; the rest is one einsum of activations.
Letters that are left out of the result are summed in the end.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from torch.fx import Graph, Node

from analogfx.passes.contract import Refused
from analogfx.passes.stationary import weight_value


def _einsum(graph: Graph, equation: Any, *operands: Any) -> Node | None:
    """``torch.einsum``; None for what is one product, written with '->'."""
    given = equation
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    if not isinstance(equation, str):
        equation, operands = _from_lists(equation, *operands)
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(operands):
        raise Refused("it has another number of operands than its equation has terms")
    known = len(operands) <= 2 and arrow and isinstance(given, str)
    if known and not _summed(terms, result):
        return None
    return _in_pairs(graph, list(operands), terms, result if arrow else _implied(terms))


def _from_lists(*values: Any) -> tuple[str, tuple[Any, ...]]:
    """The equation of operands that each come with a list of numbers for letters."""
    operands, lists = values[::2], list(values[1::2])
    arrow = ""
    if len(values) % 2:
        operands, arrow = operands[:-1], "->" + _term(values[-1])
    return ",".join(map(_term, lists)) + arrow, operands


def _term(numbers: Any) -> str:
    return "".join("..." if n is Ellipsis else string.ascii_letters[n] for n in numbers)


def _implied(terms: list[str]) -> str:
    """The result of an equation without one: letters that stand once, in alphabetical order."""
    letters = "".join(terms).replace(".", "")
    once = sorted(c for c in set(letters) if letters.count(c) == 1)
    return ("..." if any("..." in term for term in terms) else "") + "".join(once)


def _summed(terms: list[str], result: str) -> bool:
    """Whether a letter stands in one term alone, and not in the result."""
    letters = "".join(map("".join, map(set, terms)))
    return any(letters.count(c) == 1 and c not in result for c in letters.replace(".", ""))


def _in_pairs(graph: Graph, operands: list[Any], terms: list[str], result: str) -> Node:
    while any(weight_value(operand) is not None for operand in operands):
        x, w = _next_pair(operands, terms, result)
        others = "".join(t for i, t in enumerate(terms) if i not in (x, w)) + result
        kept = [c for c in terms[x].replace(".", "") if c not in terms[w] or c in others]
        kept += [c for c in terms[w] if c not in terms[x]]
        if "..." in terms[w]:
            raise Refused("the weight has '...'")
        term = ("..." if "..." in terms[x] else "") + "".join(kept)
        if len(operands) == 2 and sorted(term) == sorted(result):
            term = result
        equation = f"{terms[x]},{terms[w]}->{term}"
        product = graph.call_function(torch.einsum, (equation, operands[x], operands[w]))
        left = [i for i in range(len(operands)) if i not in (x, w)]
        operands = [product, *(operands[i] for i in left)]
        terms = [term, *(terms[i] for i in left)]
    if terms == [result]:
        return operands[0]
    return graph.call_function(torch.einsum, (f"{','.join(terms)}->{result}", *operands))


def _next_pair(operands: list[Any], terms: list[str], result: str) -> tuple[int, int]:
    """An activation and a parameter that share a letter which nothing else has."""
    for w, weight in enumerate(operands):
        if weight_value(weight) is None:
            continue
        for x, activation in enumerate(operands):
            if isinstance(activation, Node) and "stationary" in activation.meta:
                continue
            others = "".join(t for i, t in enumerate(terms) if i not in (x, w)) + result
            if any(c in terms[x] and c not in others for c in terms[w]):
                return x, w
    raise Refused("no activation is contracted with a weight alone")


RULES: dict[Any, Any] = {torch.einsum: ("einsum", _einsum)}
