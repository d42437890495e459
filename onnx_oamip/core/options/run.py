"""Options of the execution of a run: solver, device, workers, cache, seed, memory, and conditions for writing."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from onnx_oamip.core.options.validation import Options
from onnx_oamip.core.options.values import (
    Address,
    Count,
    CountOrZero,
    Memory,
    Name,
    Seconds,
    Shown,
)
from onnx_oamip.core.solvers import SolverName

ACTIVATION_MEMORY = 1 << 30
"""Bytes of activations held at the same time where no option bounds memory."""
SHARES_OF_MEMORY = 4
"""Activations, results computed from them, and ONNX Runtime's own copies share the memory of a run."""
_OUTPUT = Shown(heading="Output")


class RunOptions(Options):
    """Options of the execution of a run; most of them do not change the result under a counted budget."""

    heading: ClassVar[str] = "Speed and resources"

    solver: SolverName = Field(
        "auto",
        description="Solver of the programs; auto takes Gurobi where its licence allows the program's size, else "
        "HiGHS.",
    )
    time_limit: Seconds = Field(
        60.0,
        description="Most seconds for one solve of a program; the best found by then is taken and its gap reported.",
    )
    write_program: Annotated[Name | None, Shown(metavar="DIR|FILE.mps|FILE.lp")] = Field(
        None,
        description="Write every program that is solved for scores or widths, with names by unit, layer and sample: "
        "into a folder as MPS files, or as FILE-TITLE.mps or FILE-TITLE.lp.",
    )
    read_solutions: Annotated[Name | None, Shown(metavar="DIR")] = Field(
        None,
        description="Folder with solutions of programs that `write_program` wrote, as TITLE.sol with a line NAME VALUE "
        "for every variable: the solver starts from them where they are better than its own first point.",
    )
    workers: Count | None = Field(
        None,
        description="Groups that are scored or measured at the same time. Default: one for every core.",
    )
    scheduler: Address | None = Field(
        None,
        description="Score and measure groups on the workers of the Dask scheduler at this address, such as "
        "tcp://host:8786, in place of `workers` here. The result is the same. Needs the extra 'cluster'.",
    )
    cache: Annotated[Name, Shown(metavar="DIR|auto|off")] = Field(
        "auto",
        description="Where to store statistics, scores and losses of a model and its data, so that another budget "
        "starts from them; auto is $ONNX_OAMIP_CACHE, or else the user's cache folder.",
    )
    force: Annotated[bool, _OUTPUT] = Field(
        False,
        description="Write the model even where it was measured slower than the original, or is larger.",
    )
    strict: Annotated[bool, _OUTPUT] = Field(
        False,
        description="Fail where channels of a layer cannot be removed for another reason than the model's inputs and "
        "outputs.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="Where the model runs; auto takes CUDA where it works, and asking for cuda where it does not is an "
        "error.",
    )
    op_library: Annotated[tuple[Name, ...], Shown(metavar="FILE")] = Field(
        (),
        description="Shared library of custom operators that the model has, for ONNX Runtime to register; may be given "
        "more than once.",
    )
    seed: CountOrZero = Field(
        0,
        description="Seed of everything random; with the same seed a budget that is counted gives the same model.",
    )
    batch_size: Count = Field(
        32,
        description="Samples that models are run on at a time to be compared; a model with a fixed batch keeps its "
        "own. The written model does not depend on it.",
    )
    max_memory: Memory | None = Field(
        None,
        description="Aim at this much memory, such as 2GB: while learning a quarter of it goes to activations, an "
        "eighth to second moments and half to the groups that are solved side by side, so there are fewer samples at a "
        "time, and coarser moments of wide layers. It is no hard limit, and it can change the result. Default: 1 GiB "
        "of activations.",
    )
    no_provenance: Annotated[bool, _OUTPUT] = Field(
        False,
        description="Leave out of the model's metadata which file it was made from, by which plan and version.",
    )

    @property
    def activation_memory_limit(self) -> int:
        """Upper bound in bytes on activations held at the same time."""
        if self.max_memory is None:
            return ACTIVATION_MEMORY
        return min(ACTIVATION_MEMORY, self.max_memory // SHARES_OF_MEMORY)
