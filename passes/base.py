"""What a pass is."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

from torch import Tensor, fx

from ..ir import PassError, Program, fingerprint, path_of, verify
from .context import PassContext

__all__ = ["Fidelity", "Pass", "PassContext", "PassResult", "Remark"]


class Fidelity(enum.Enum):
    """How close the outputs of the result are to the outputs of the input program."""

    BITWISE = "bitwise"  # the same bits
    ROUNDING = "rounding"  # equal in exact arithmetic
    LOSSY = "lossy"  # a different function on purpose


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing a pass did, or refused to do and why.

    Attributes:
        kind: ``applied``, or ``missed`` for what was refused.
        where: a node, weight or block, as the text form prints it; the name of the pass for what
            is said of its work as a whole, which ``run`` prints.
        message: what was done, or why not.
    """

    kind: Literal["applied", "missed"]
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.message}"


@dataclass(frozen=True, slots=True)
class PassResult:
    """The program after a pass, and what the pass says about it.

    Attributes:
        program: the result.
        remarks: what was done, and what was refused.
        details: figures for the manifest, such as a learning curve; plain JSON values.  A pass that
            made a choice has a ``recipe``: the text that makes it again without a search; where it
            chose widths, ``blocks`` has ``bits`` and ``score`` by name.
    """

    program: Program
    remarks: tuple[Remark, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        """Whether the pass says that it changed something."""
        return any(r.kind == "applied" for r in self.remarks)


@dataclass(frozen=True)
class Pass(ABC):
    """A named function from program to program; its dataclass fields are its options.

    Attributes:
        name: what the pass is called in a pipeline text.
        fidelity: what it promises about outputs.
        changes_signature: whether it may add or remove inputs and outputs.
        heals: whether it trains the model back; budgets then judge what comes out of it, not what
            earlier passes lost.
    """

    name: ClassVar[str]
    fidelity: ClassVar[Fidelity]
    changes_signature: ClassVar[bool] = False
    heals: ClassVar[bool] = False

    @abstractmethod
    def run(self, program: Program, context: PassContext) -> PassResult:
        """Transform ``program``, a private copy that may be edited, and return the result."""

    def requires(self, program: Program) -> None:
        """Raise ``PassError`` when ``program`` is not a legal input of this pass."""

    def ensures(self, before: Program, after: Program) -> None:
        """Raise ``PassError`` when ``after`` breaks an exact claim about ``before``."""

    def kept(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return what an exact pass promises to keep of the outputs of one run: all of them.

        A pass that is exact for what the model means, yet moves some raw numbers, returns the rest,
        or what the numbers mean (log-probabilities for logits), and says so in its docstring.  The
        pipeline compares this for the program before and after the pass.

        Args:
            inputs: of the run, by name.
            outputs: of the run, by name.
        """
        return outputs

    @final
    def __call__(self, program: Program, context: PassContext | None = None) -> PassResult:
        """Check, run on a copy, clean up, verify, check.

        Raises:
            PassError: the pass refuses the program, or broke its own contract.
            VerifyError: the result is no legal program.
        """
        self.requires(program)
        result = self.run(program.editable(), context or PassContext())
        after = result.program
        after.clean()
        verify(after)
        self._check_signature(program, after)
        self._check_ties(program, after, result.remarks)
        changed = fingerprint(after) != fingerprint(program)
        if changed and not result.modified:
            raise PassError(f"{self.name}: changed the program and made no 'applied' remark")
        if changed:
            self.ensures(program, after)
        return PassResult(after, result.remarks, result.details)

    def _check_signature(self, before: Program, after: Program) -> None:
        if self.changes_signature or before.signatures == after.signatures:
            return
        raise PassError(f"{self.name}: changed the signature, which it does not declare")

    def _check_ties(self, before: Program, after: Program, remarks: tuple[Remark, ...]) -> None:
        """Weights that were tied stay tied, unless a remark says ``untied``."""
        apart = _untied(before, after)
        if apart and not any("untied" in remark.message for remark in remarks):
            raise PassError(
                f"{self.name}: untied {', '.join(apart)} and did not say so",
                remedy="keep one weight for all its readers, or remark that it is untied",
            )


def _untied(before: Program, after: Program) -> list[str]:
    """Return the weights whose readers share no weight any more."""
    apart = []
    for name in sorted(set(before.weights.aliases.values())):
        paths = {path_of(reader) for reader in _readers(before, name)}
        read = [names for path in paths if (names := _read_at(after, path))]
        if len(read) > 1 and not set.intersection(*read):
            apart.append(name)
    return apart


def _readers(program: Program, name: str) -> list[fx.Node]:
    graphs = program.graphs.values()
    nodes = [node for graph in graphs for node in graph.find_nodes(op="get_attr")]
    return [user for node in nodes if node.target == name for user in node.users]


def _read_at(program: Program, path: str) -> set[str]:
    """Return the names of the weights that the calls of one module read."""
    return {
        str(source.target)
        for graph in program.graphs.values()
        for node in graph.nodes
        if node.op == "call_function" and path_of(node) == path
        for source in node.all_input_nodes
        if source.op == "get_attr"
    }
