"""The ONNX backend: programs as ONNX files that ONNX Runtime runs without modelathe."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...ir import Program
from ...passes import Canonicalize, ConvertDtype, PassContext, Remark
from ...passes.progress import Progress
from ..base import Backend
from ..companions import write_companions
from ..session import Session, read_config
from .session import OnnxSession, file_name

if TYPE_CHECKING:
    import onnx_ir as ir

DType = Literal["float32", "float16", "bfloat16"]
_EXTERNAL_ABOVE = 10**9  # bytes of weights; a protobuf file cannot exceed 2 GiB
_OPSETS = range(18, 24)


@dataclass(frozen=True, kw_only=True)
class Onnx(Backend):
    """Write ONNX: one file per graph, weights streamed, quantised linears as MatMulNBits.

    Attributes:
        opset: version of the standard operators, 18 to 23; 23 has attention and norms as single
            nodes, which ran as fast as smaller ones or faster.
        dtype: what to compute in; none: as the last ``convert-dtype`` of the pipeline says, else
            float32, which every processor runs fast.
        accuracy_level: of quantised products: 4 rounds activations to 8-bit integers, which is
            fastest; 1 keeps them in float32.
        external_data: where weights go: auto puts them into a file of their own above 1 GB.
    """

    name: ClassVar[str] = "onnx"
    runtime: ClassVar[tuple[str, ...]] = ("onnx", "onnxruntime")

    opset: int = 23
    dtype: DType | None = None
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    external_data: Literal["auto", "always"] = "auto"

    def __post_init__(self) -> None:
        if self.opset not in _OPSETS:
            raise ValueError(f"opset is {_OPSETS[0]} to {_OPSETS[-1]}, got {self.opset}")
        if self.accuracy_level not in range(5):
            raise ValueError(f"accuracy_level is 0 to 4, got {self.accuracy_level}")

    def prepare(self, program: Program) -> Program:
        """Return the program in canonical form, which has single nodes, and in the dtype to write.

        A pipeline begins with that form; a program that comes from none, or was saved by an earlier
        version, may not have it.
        """
        program = Canonicalize()(program, PassContext()).program
        dtype = self.converts_to(program.origin.passes)
        if dtype is None or self.computes_in(program) == dtype:
            return program
        return ConvertDtype(to=dtype)(program, PassContext()).program

    def converts_to(self, passes: Sequence[str]) -> DType | None:
        """Return the dtype asked for, else float32 unless the pipeline chose one."""
        chosen = any(text.partition("{")[0] == ConvertDtype.name for text in passes)
        return self.dtype or (None if chosen else "float32")

    def write(self, program: Program, folder: Path, context: PassContext) -> dict[str, Any]:
        """Write graphs, weights, configuration and tokenizer into an empty folder.

        Returns remarks for the manifest: what could not be written as the program has it.

        Raises:
            LoweringError: a call of the program has no translation; the message names it.
        """
        from .files import save_model, weight_bytes
        from .quantized import widened

        models = {name: self.model(program, name) for name in program.graphs}
        total = sum(weight_bytes(model) for model in models.values())
        external = self.external_data == "always" or total > _EXTERNAL_ABOVE
        count = sum(len(model.graph.initializers) for model in models.values())
        with context.progress.task("writing weights", total=count) as advance:
            for name, model in models.items():
                save_model(model, folder / file_name(name), external=external, advance=advance)
        write_companions(program, folder)
        found = [*self._write_genai(program, folder), *widened(program)]
        return {"remarks": list(map(str, found))} if found else {}

    def file_names(self, program: Program) -> list[str]:
        from .genai import GENAI_CONFIG, genai_obstacle

        names = [file_name(graph) for graph in program.graphs]
        if self.external_data == "always":
            names += [f"{name}.data" for name in names]
        if program.kind == "decoder" and not genai_obstacle(program.signature, program.config):
            names.append(GENAI_CONFIG)
        return [*names, *super().file_names(program)]

    def model(self, program: Program, graph: str = "main") -> ir.Model:
        """Return one graph as an ONNX model whose weights are read when it is written."""
        from .emit import emit

        model = emit(
            program.graphs[graph],
            program.signatures[graph],
            program.weights,
            name=graph,
            opset=self.opset,
            accuracy_level=self.accuracy_level,
        )
        model.metadata_props.update(_metadata(program))
        return model

    def _write_genai(self, program: Program, folder: Path) -> tuple[Remark, ...]:
        """Write onnxruntime-genai's configuration for a decoder, or return why not."""
        from .genai import GENAI_CONFIG, genai_config, genai_obstacle

        if program.kind != "decoder":
            return ()
        obstacle = genai_obstacle(program.signature, program.config)
        if obstacle:
            return (Remark("missed", GENAI_CONFIG, f"not for onnxruntime-genai: {obstacle}"),)
        generation = read_config(folder, "generation_config.json")
        settings = genai_config(program.signature, program.config, generation)
        text = json.dumps(settings, indent=2) + "\n"
        (folder / GENAI_CONFIG).write_text(text, encoding="utf-8")
        return ()

    @classmethod
    def open(
        cls, folder: Path, manifest: Mapping[str, Any], *, threads: int, progress: Progress
    ) -> Session:
        with progress.task(f"opening {folder}"):
            return OnnxSession(folder, manifest, threads=threads)

    @contextlib.contextmanager
    def exact_session(self, folder: Path) -> Iterator[Session]:
        from .exact import exact_session

        with exact_session(folder) as session:
            yield session


def _metadata(program: Program) -> dict[str, str]:
    from importlib.metadata import version

    return {
        "tool": f"modelathe {version('modelathe')}",
        "model": program.origin.model,
        "pipeline": ",".join(program.origin.passes),
    }
