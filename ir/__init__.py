"""What a program is: capture, run, print, verify, save."""

from . import activations as _activations  # noqa: F401  (registers torch.ops.modelathe)
from . import cache as _cache  # noqa: F401  (registers torch.ops.modelathe)
from . import ops as _ops  # noqa: F401  (registers torch.ops.modelathe)
from . import sparse as _sparse  # noqa: F401  (registers torch.ops.modelathe)
from .blocks import (
    Block,
    block_of,
    find_blocks,
    info_of,
    leave_block,
    mark,
    marks_of,
    path_of,
    set_info,
)
from .calls import (
    Attention,
    BatchNorm,
    Convolution,
    Embedding,
    Linear,
    Norm,
    QuantizedEmbedding,
    QuantizedLinear,
    Rotary,
    is_weight,
)
from .capture import capture
from .computed import SCRATCH, ComputedWeight
from .errors import (
    CaptureError,
    DataError,
    FidelityError,
    LoweringError,
    ModelatheError,
    PassError,
    SpecSyntaxError,
    StorageError,
    VerifyError,
)
from .files import FileWeight, SafetensorsFile
from .infer import insert_call
from .precision import cast_weight, converted, kept_calls, main_dtype
from .printer import call_name, fingerprint, graph_text, to_text
from .program import (
    MAIN,
    Kind,
    Origin,
    Program,
    Signature,
    call_key,
    parameter_count,
    stored_bytes,
)
from .storage import is_program_folder, load_program, save_program
from .verifier import INVARIANTS, verify
from .weights import TensorWeight, Weight, Weights, content_hash, is_finite, last_made

__all__ = [
    "INVARIANTS",
    "MAIN",
    "SCRATCH",
    "Attention",
    "BatchNorm",
    "Block",
    "CaptureError",
    "ComputedWeight",
    "Convolution",
    "DataError",
    "Embedding",
    "FidelityError",
    "FileWeight",
    "Kind",
    "Linear",
    "LoweringError",
    "ModelatheError",
    "Norm",
    "Origin",
    "PassError",
    "Program",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "Rotary",
    "SafetensorsFile",
    "Signature",
    "SpecSyntaxError",
    "StorageError",
    "TensorWeight",
    "VerifyError",
    "Weight",
    "Weights",
    "block_of",
    "call_key",
    "call_name",
    "capture",
    "cast_weight",
    "content_hash",
    "converted",
    "find_blocks",
    "fingerprint",
    "graph_text",
    "info_of",
    "insert_call",
    "is_finite",
    "is_program_folder",
    "is_weight",
    "last_made",
    "kept_calls",
    "leave_block",
    "load_program",
    "main_dtype",
    "mark",
    "marks_of",
    "parameter_count",
    "path_of",
    "save_program",
    "set_info",
    "stored_bytes",
    "to_text",
    "verify",
]
