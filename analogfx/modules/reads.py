"""Which weights a forward that cannot be traced may multiply by, read off its source.

Reads the functions that a call may run, with what is known of the module: branches that its
attributes or default arguments rule out are left out, and so are weights that are only asked for
their dtype, added, or looked up in. What the source does not settle counts as a product.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from analogfx.passes.code import OPAQUE, codes, functions_of, is_torchs, mentions, reached
from analogfx.passes.harmless import PRODUCTS

Paths = frozenset[str]


def attribute_of(module: nn.Module, name: str) -> list[Any]:
    """What calling an attribute of a module may run: a method of any of its classes, or a value.

    Values in lists and tables count, modules do not.
    """
    cls = getattr(type(module), "digital_class", type(module))
    bases = (base for base in cls.__mro__ if base is not nn.Module)
    value = module.__dict__.get(name)
    several = [*value.values()] if isinstance(value, dict) else value
    if not isinstance(several, (list, tuple)):
        several = []
    return [vars(base)[name] for base in bases if name in vars(base)] + [value, *several[:64]]


def mentions_product(module: nn.Module, forward: Any) -> bool:
    """Whether a forward, or a function that it calls, could hold a product."""
    if not isinstance(forward, FunctionType):
        return True  # there is no telling
    return mentions(functions_of(forward), PRODUCTS, functools.partial(attribute_of, module))


def multiplies_arguments(module: nn.Module) -> bool:
    """Whether a module without a matrix may hold products: they are of what it is called with."""
    if any(_is_matrix(p) for p in module.parameters()):
        return False
    return any(mentions_product(m, type(m).forward) for m in module.modules())


def mentions_weight(module: nn.Module, forward: Any) -> bool:
    """Whether a forward, or a function that it calls, reads what a matrix inside is called."""
    names = {n.rpartition(".")[2] for n, p in module.named_parameters() if _is_matrix(p)}
    functions = reached(functions_of(forward), functools.partial(attribute_of, module))
    return any(isinstance(f, FunctionType) and names & {*f.__code__.co_names} for f in functions)


def multiplied(module: nn.Module, forward: Any, defaults: Mapping[str, Any]) -> dict[str, bool]:
    """Parameters of two dimensions or more that a module's own code may multiply by.

    Args:
        forward: the forward that runs.
        defaults: the arguments that a call leaves out, by name.

    Returns:
        By path from the module, of its own parameters and of those of modules inside it: whether
        every product that was found is by the parameter itself, in Python's code.
    """
    matrices = [n for n, p in module.named_parameters() if _is_matrix(p)]
    if not isinstance(forward, FunctionType):
        return {n: False for n in matrices if "." not in n}
    reader = _Reader(module, matrices, forward)
    found = reader.read(dict(defaults))
    return {n: n not in reader.altered for n in matrices if n in found}


def _is_matrix(parameter: Any) -> bool:
    return nn.parameter.is_lazy(parameter) or parameter.dim() > 1


_DESCRIBE = {
    "dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_meta", "is_sparse", "grad",
    "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "element_size",
    "register_hook", "layout", "nelement", "is_complex", "data_ptr", "ds_shape",
}  # fmt: skip
"""Attributes of a tensor that say nothing of its values."""

_SAME = {
    "t", "transpose", "permute", "squeeze", "unsqueeze", "view", "reshape", "contiguous", "to",
    "type", "type_as", "float", "half", "bfloat16", "cuda", "cpu", "requires_grad_", "get",
    "items", "values", "keys", "pop",
}  # fmt: skip
"""Methods that give a weight itself: of a dict, in another shape, in its usual type."""

_ADD = {"addmm", "addmv", "addr", "addbmm", "baddbmm"}
"""Products that are added to their first argument."""

_LOOKED_UP = {
    "isinstance", "hasattr", "len", "print", "type", "id", "callable", "embedding", "embedding_bag",
    "layer_norm", "group_norm", "rms_norm", "batch_norm", "instance_norm", "prelu", "getattr",
    "is_tensor", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like",
    "get_device", "index_select", "interpolate", "finfo", "warn", "info", "warning", "repr", "str",
}  # fmt: skip
"""Calls that multiply by nothing, and whose result is no weight."""


class _Reader:
    """Reads what a call may run, function by function."""

    def __init__(self, module: nn.Module, matrices: list[str], forward: FunctionType) -> None:
        self.module, self.matrices, self.forward = module, matrices, forward
        self.found: set[str] = set()
        self.altered: set[str] = set()
        """What is computed with before a product may see it, or goes into code that is unknown."""
        self.returns: dict[FunctionType, Paths] = {}
        """The weights that a function returns."""
        self.pending: list[tuple[FunctionType, Paths, dict[str, Any], dict[str, Paths]]] = []
        self.done: set[tuple[Any, ...]] = set()

    def read(self, defaults: dict[str, Any]) -> set[str]:
        before = None
        while before != self.returns:  # whoever calls a function is read before it is
            before = dict(self.returns)
            self.done.clear()
            for function in functions_of(self.forward):
                self.call(function, (_SELF,), {}, defaults)
            while self.pending:
                self.read_function(*self.pending.pop())
        return self.found

    def read_function(
        self, function: FunctionType, selves: Paths, constants: Any, weights: dict[str, Paths]
    ) -> None:
        """Read one function, or count all that it may multiply by where it has no source."""
        try:
            _Function(self, function, selves, constants, weights).read()
        except (OSError, TypeError, SyntaxError, RecursionError):
            self.found.update(*weights.values())
            self.altered.update(*weights.values())
            if selves:
                self.suspect_all()

    def suspect_all(self) -> None:
        """Count the module's matrices, and those inside that are named, if there is a product."""
        if self.speaks:
            attribute = functools.partial(attribute_of, self.module)
            functions = reached(functions_of(self.forward), attribute)
            named = {
                name
                for function in functions
                if isinstance(function, FunctionType)
                for code in codes(function.__code__)
                for name in code.co_names
            }
            for path in self.matrices:
                if all(p in named or p.isdecimal() for p in path.split(".")) or "." not in path:
                    self.found.add(path)
                    self.altered.add(path)

    @functools.cached_property
    def speaks(self) -> bool:
        """Whether the forward could hold a product at all."""
        return mentions_product(self.module, self.forward)

    def call(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        constants: dict[str, Any] | None = None,
    ) -> None:
        """Read a function that is called with the module or with weights.

        Args:
            args, kwargs: for each argument :data:`_SELF`, or the weights that it is made of.
        """
        if not isinstance(function, FunctionType):
            if function is OPAQUE or function.__name__.strip("_") in PRODUCTS:
                for value in (*args, *kwargs.values()):
                    self.found |= value if value is not _SELF else set()
                    if function is OPAQUE and value is not _SELF:
                        self.altered |= value
            return
        given = _bound(function, args, kwargs)
        selves = frozenset(n for n, v in given.items() if v is _SELF)
        weights = {n: v for n, v in given.items() if v is not _SELF and v}
        key = (function, selves, *sorted((n, *sorted(v)) for n, v in weights.items()))
        if key not in self.done:
            self.done.add(key)
            self.pending.append((function, selves, constants or {}, weights))


def _bound(function: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What each parameter of a function gets.

    What ``*args`` and ``**kwargs`` get stands there together, and each by itself: under ``*0``,
    ``*1``, ... and ``**name``.
    """
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    known = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    given = dict(zip(named, args, strict=False))
    given |= {name: value for name, value in kwargs.items() if name in known}
    several = {f"*{i}": value for i, value in enumerate(args[len(named) :])}
    by_name = {f"**{name}": value for name, value in kwargs.items() if name not in known}
    for parameter in parameters:
        starred = parameter.kind is parameter.VAR_POSITIONAL
        double = parameter.kind is parameter.VAR_KEYWORD
        values = several if starred else by_name if double else {}
        if _SELF in values.values():
            given[parameter.name] = _SELF
        elif values:
            given |= values | {parameter.name: frozenset().union(*values.values())}
    return given


_SELF: Any = frozenset(["self"])
_UNKNOWN = object()


class _Function:
    """One function, with what its arguments are."""

    def __init__(
        self,
        reader: _Reader,
        function: FunctionType,
        selves: Paths,
        constants: dict[str, Any],
        weights: dict[str, Paths],
    ) -> None:
        self.reader, self.function = reader, function
        self.selves, self.constants = selves, constants
        self.names: dict[str, Paths] = dict(weights)
        self.children: dict[str, list[nn.Module]] = {}
        tree = ast.parse(textwrap.dedent(inspect.getsource(function.__code__)))
        self.own = {
            n.id for n in ast.walk(tree) if type(n) is ast.Name and type(n.ctx) is ast.Store
        }
        self.own |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        """Names that the function binds: no global of such a name is meant."""
        self.tree = self._live(tree)
        self.parents = {c: p for p in ast.walk(self.tree) for c in ast.iter_child_nodes(p)}
        self._bind_children()

    # ---------------------------------------------------------------------- what is known to run

    def _live(self, tree: Any) -> Any:
        """The tree without the branches that are not taken."""
        reader = self

        class Prune(ast.NodeTransformer):
            def visit_If(self, node: ast.If) -> Any:
                value = reader._value(node.test)
                if value is not _UNKNOWN:
                    kept = node.body if value else node.orelse
                    return [self.visit(n) for n in kept] or ast.Pass()
                return self.generic_visit(node)

            def visit_IfExp(self, node: ast.IfExp) -> Any:
                value = reader._value(node.test)
                if value is not _UNKNOWN:
                    return self.visit(node.body if value else node.orelse)
                return self.generic_visit(node)

        stored = {
            n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        }
        self.constants = {k: v for k, v in self.constants.items() if k not in stored}
        self.selves -= stored
        live = Prune().visit(tree)
        for node in ast.walk(live):
            for name in ("body", "orelse", "finalbody"):
                block = getattr(node, name, None)
                if isinstance(block, list):
                    setattr(node, name, _until_end(block))
        return live

    def _value(self, node: ast.expr) -> Any:
        """The value of an expression of constants and attributes, else that it is not known."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.constants.get(node.id, _UNKNOWN)
        if isinstance(node, ast.Attribute):
            return self._attribute(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self._value(node.operand)
            return _UNKNOWN if value is _UNKNOWN else not value
        if isinstance(node, ast.BoolOp):
            return self._boolean(node)
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self._value(node.left), self._value(node.comparators[0])
            rule = _COMPARE.get(type(node.ops[0]))
            if _UNKNOWN in (left, right) or rule is None:
                return _UNKNOWN
            try:
                return rule(left, right)
            except TypeError:
                return _UNKNOWN
        return _UNKNOWN

    def _boolean(self, node: ast.BoolOp) -> Any:
        values = [self._value(v) for v in node.values]
        decides = isinstance(node.op, ast.Or)
        if any(v is not _UNKNOWN and bool(v) is decides for v in values):
            return decides
        return _UNKNOWN if _UNKNOWN in values else not decides

    def _attribute(self, node: ast.Attribute) -> Any:
        """A plain value that the module holds."""
        owner = self._object(node.value)
        if owner is _UNKNOWN or node.attr == "training":  # both modes count
            return _UNKNOWN
        value = getattr(owner, node.attr, _UNKNOWN)
        return value if isinstance(value, (bool, int, float, str, type(None))) else _UNKNOWN

    def _object(self, node: ast.expr) -> Any:
        """The object that a chain of attributes leads to from the module."""
        if isinstance(node, ast.Name):
            return self.reader.module if node.id in self.selves else _UNKNOWN
        if isinstance(node, ast.Attribute):
            owner = self._object(node.value)
            value = _UNKNOWN if owner is _UNKNOWN else _held(owner, node.attr)
            return _UNKNOWN if isinstance(value, Tensor) else value
        return _UNKNOWN

    # ------------------------------------------------------------------------------ what is read

    def read(self) -> None:
        """Follow every weight to what is done with it; until no name holds more than before."""
        while True:
            before = dict(self.names)
            for node in ast.walk(self.tree):
                if isinstance(node, ast.Call):
                    self._descend(node)
                elif not isinstance(node, _READS) or not isinstance(node.ctx, ast.Load):
                    continue
                weights = self._weights(node)
                if weights:
                    self._use(node, weights)
            if self.names == before:
                return

    def _weights(self, node: ast.expr) -> Paths:
        """The matrices that an expression names."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, frozenset())
        if isinstance(node, ast.Call):
            returns = self.reader.returns
            return frozenset().union(*(returns.get(f, ()) for f in self._functions(node)))
        path = self._path(node)
        if path is None:
            return frozenset()
        if path in _ALL and self._object(node.value) is self.reader.module:  # type: ignore
            self.reader.suspect_all()
        pattern = path.split(".")
        several = isinstance(self._object(node), (nn.ParameterList, nn.ParameterDict))
        return frozenset(m for m in self.reader.matrices if _fits(pattern, m.split("."), several))

    def _path(self, node: ast.expr) -> str | None:
        """The path that an expression reads from the module, with ``*`` for what is computed."""
        if isinstance(node, ast.Name):
            return "" if node.id in self.selves else None
        if isinstance(node, ast.Attribute):
            owner, last = self._path(node.value), node.attr
        elif isinstance(node, ast.Subscript):
            owner = self._path(node.value)
            index = node.slice
            last = str(index.value) if isinstance(index, ast.Constant) else "*"
        else:
            return None
        return None if owner is None else f"{owner}.{last}" if owner else last

    def _use(self, node: Any, weights: Paths) -> None:
        """Climb from a weight to what becomes of it."""
        while True:
            parent = self.parents.get(node)
            if isinstance(parent, ast.Attribute):
                if parent.attr in _DESCRIBE:
                    return
                call = self.parents.get(parent)
                if isinstance(call, ast.Call) and call.func is parent:
                    if parent.attr.strip("_") in _ADD:
                        return
                    if parent.attr.strip("_") in PRODUCTS and not self._computes(call):
                        self.reader.found |= weights
                        return
                    if parent.attr not in _SAME:
                        self.reader.altered |= weights
                    node = call
                    continue
            elif isinstance(parent, ast.BinOp):
                other = parent.right if parent.left is node else parent.left
                if not self._is_constant(other):
                    if isinstance(parent.op, ast.MatMult):
                        self.reader.found |= weights
                    return  # an activation
                self.reader.altered |= weights
            elif isinstance(parent, ast.keyword):
                call = self.parents[parent]
                if not (_called(call) in _ADD and parent.arg == "input"):
                    self._argument(call, weights)
                return
            elif isinstance(parent, ast.Call):
                function = _called(parent) in _ADD and self._global(parent.func) is not _UNKNOWN
                if function and parent.args[:1] == [node]:
                    return
                if self._argument(parent, weights):
                    node = parent
                    continue
                return
            elif isinstance(parent, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
                targets = parent.targets if isinstance(parent, ast.Assign) else [parent.target]
                for target in targets:
                    self._bind(target, weights)
                if not isinstance(parent, ast.NamedExpr):
                    return
            elif isinstance(parent, (ast.For, ast.comprehension)):
                if parent.iter is node:
                    self._bind(parent.target, weights)
                return
            elif isinstance(parent, ast.Return):
                known = self.reader.returns.get(self.function, frozenset())
                self.reader.returns[self.function] = known | weights
                return
            elif isinstance(parent, ast.IfExp):
                if parent.test is node:
                    return
            elif isinstance(parent, ast.Subscript):
                if parent.value is not node:
                    return
                self.reader.altered |= weights
            elif isinstance(parent, ast.UnaryOp):
                self.reader.altered |= weights
            elif not isinstance(parent, _CARRIES):
                return
            node = parent

    def _bind(self, target: ast.expr, weights: Paths) -> None:
        for name in ast.walk(target):
            if isinstance(name, ast.Name):
                self.names[name.id] = self.names.get(name.id, frozenset()) | weights

    def _is_constant(self, node: ast.expr) -> bool:
        """Whether an expression is made of the module and constants alone."""
        return all(
            name.id in self.selves or name.id in self.names or self._global(name) is not _UNKNOWN
            for name in ast.walk(node)
            if isinstance(name, ast.Name)
        )

    def _computes(self, call: Any) -> bool:
        """Whether a product is one of weights alone, which gives a weight."""
        method = isinstance(call.func, ast.Attribute) and self._global(call.func) is _UNKNOWN
        factors = [*call.args, *(k.value for k in call.keywords)]
        factors += [call.func.value] if method else []
        return all(self._is_constant(f) for f in factors)

    # ----------------------------------------------------------------------------- what is called

    def _argument(self, call: Any, weights: Paths) -> bool:
        """Weights as arguments of a call; whether its result is a weight, too."""
        name = _called(call)
        if name.strip("_") in PRODUCTS:
            if self._computes(call):
                self.reader.altered |= weights
                return True
            self.reader.found |= weights
            return False
        if name in _LOOKED_UP:
            return False
        modules = self._modules(call.func)
        if modules:
            if any(multiplies_arguments(m) for m in modules):
                self.reader.found |= weights
            return False
        found = self._functions(call)
        if found and all(is_torchs(f) for f in found):
            self.reader.altered |= weights if name not in _SAME else set()
            return not name.endswith("norm")
        if found:
            return False  # it is read with these arguments
        if isinstance(call.func, ast.Name) and call.func.id in _BUILTINS:
            return True
        self.reader.found |= weights  # there is no telling
        self.reader.altered |= weights
        return False

    def _descend(self, call: ast.Call) -> None:
        """Read what a call runs, where it is given the module or weights."""
        found = self._functions(call)
        if not found:
            return
        args = [g for a in call.args for g in self._positional(a)]
        kwargs = {k.arg: self._given(k.value) for k in call.keywords if k.arg}
        if any(k.arg is None for k in call.keywords):
            kwargs |= {n[2:]: w for n, w in self.names.items() if n.startswith("**")}
        bound = isinstance(call.func, ast.Attribute) and (
            self._object(call.func.value) is self.reader.module or _is_super(call.func.value)
        )
        if bound:
            args.insert(0, _SELF)
        if any(args) or any(kwargs.values()):
            for function in found:
                # A torch function that is no method is known by its name.
                if bound or not is_torchs(function):
                    self.reader.call(function, tuple(args), kwargs)

    def _positional(self, argument: ast.expr) -> list[Any]:
        """What an argument is: several, for one with a star."""
        numbers = [int(n[1:]) for n in self.names if n[0] == "*" and n[1:].isdecimal()]
        if not isinstance(argument, ast.Starred) or not numbers:
            return [self._given(argument)]
        return [self.names.get(f"*{i}", frozenset()) for i in range(max(numbers) + 1)]

    def _modules(self, node: ast.expr) -> list[nn.Module]:
        """The modules that an expression may be: a child, or one of a list of them."""
        if isinstance(node, ast.Subscript):
            node = node.value
        if isinstance(node, ast.Name):
            return self.children.get(node.id, [])
        held = self._object(node)
        if isinstance(held, (nn.ModuleList, nn.ModuleDict)):
            return [*held.children()]
        return [held] if isinstance(held, nn.Module) else []

    def _bind_children(self) -> None:
        """Note the names that hold modules, of a loop say."""
        for node in ast.walk(self.tree):
            value = getattr(node, "iter", getattr(node, "value", None))
            if isinstance(node, (ast.For, ast.comprehension, ast.Assign)) and value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                parts = (
                    n for n in ast.walk(value) if isinstance(n, (ast.Attribute, ast.Subscript))
                )
                found = [m for part in parts for m in self._modules(part)]
                called = isinstance(node, ast.Assign) and isinstance(value, ast.Call)
                for name in (n for target in targets for n in ast.walk(target)):
                    if isinstance(name, ast.Name) and found and not called:
                        self.children.setdefault(name.id, []).extend(found)

    def _given(self, node: ast.expr) -> Any:
        """What an argument is: the module, or the weights that it is made of."""
        if self._object(node) is self.reader.module:
            return _SELF
        found: Paths = frozenset()
        pending: list[ast.AST] = [node]
        while pending:
            part = pending.pop()
            if isinstance(part, (*_READS, ast.Call)) and not self._is_described(part):
                found |= self._weights(part)
            if isinstance(part, ast.Call) and not all(map(is_torchs, self._functions(part))):
                continue  # what it returns is known
            pending += ast.iter_child_nodes(part)
        return found

    def _is_described(self, node: ast.expr) -> bool:
        parent = self.parents.get(node)
        return isinstance(parent, ast.Attribute) and parent.attr in _DESCRIBE

    def _functions(self, call: Any) -> list[Any]:
        """The functions that a call may run, as far as they can be told."""
        function = call.func
        found: list[Any] = []
        if isinstance(function, ast.Name):
            value = self._global(function)
            found = [self._cell(function.id) or (None if value is _UNKNOWN else value)]
        elif isinstance(function, ast.Attribute):
            owner = self._object(function.value)
            if owner is self.reader.module or _is_super(function.value):
                found = attribute_of(self.reader.module, function.attr)
                if _is_super(function.value):
                    found = [f for f in found if f is not self.function]
            else:
                value = self._global(function)
                found = [] if value is _UNKNOWN else [value]
        return [f for value in found if value is not None for f in functions_of(value)]

    def _cell(self, name: str) -> Any:
        """What a name holds that a function has from around it."""
        cells = zip(
            self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True
        )
        for free, cell in cells:
            if free == name:
                try:
                    return cell.cell_contents
                except ValueError:
                    return None
        return None

    def _global(self, node: ast.expr) -> Any:
        """What a chain of names leads to from a global."""
        if isinstance(node, ast.Name):
            known = {} if node.id in self.own else self.function.__globals__
            return known.get(node.id, _UNKNOWN)
        if isinstance(node, ast.Attribute):
            owner = self._global(node.value)
            plain = isinstance(owner, (types.ModuleType, type))
            return getattr(owner, node.attr, _UNKNOWN) if plain else _UNKNOWN
        return _UNKNOWN


_ALL = {"parameters", "named_parameters", "_parameters", "state_dict", "__dict__"}
"""Attributes that give all parameters of a module."""

_READS = (ast.Name, ast.Attribute, ast.Subscript)
"""Expressions that may name a weight."""

_CARRIES = (
    ast.Starred, ast.Tuple, ast.List, ast.Dict, ast.ListComp, ast.GeneratorExp,
    ast.DictComp, ast.BoolOp,
)  # fmt: skip
"""Expressions that hold a weight as it is."""

_BUILTINS = {"list", "tuple", "zip", "enumerate", "reversed", "iter", "next", "map", "sum", "dict"}


def _held(owner: Any, name: str) -> Any:
    if isinstance(owner, nn.Module):
        for table in (owner.__dict__, owner._parameters, owner._buffers, owner._modules):
            if name in table:
                return table[name]
        return _UNKNOWN
    return getattr(owner, "__dict__", {}).get(name, _UNKNOWN)


def _fits(pattern: list[str], path: list[str], several: bool) -> bool:
    """Whether a path is a pattern's, or that of an item of a list that the pattern names."""
    if len(path) != len(pattern) + several:
        return False
    return all(p in (n, "*") for p, n in zip(pattern, path, strict=False))


def _until_end(block: list[ast.stmt]) -> list[ast.stmt]:
    """Statements up to the first that leaves the block."""
    ends = (ast.Return, ast.Raise, ast.Continue, ast.Break)
    last = next((i for i, s in enumerate(block) if isinstance(s, ends)), len(block))
    return block[: last + 1]


def _called(call: Any) -> str:
    """The last name of what a call calls."""
    function = call.func
    return str(getattr(function, "attr", getattr(function, "id", "")))


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and _called(node) == "super"


_COMPARE: dict[type, Any] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
}
