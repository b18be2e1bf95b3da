"""Patient batches as one safetensors body: for public reference populations and for encrypted site caches."""

from __future__ import annotations

import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from medgen_models.schema import PatientBatch, Schema

_VALUE = "value/"


def batch_to_bytes(batch: PatientBatch, schema: Schema) -> bytes:
    """The whole batch, ids included; who may read the bytes is the caller's affair."""
    tensors = {_VALUE + key: value.contiguous() for key, value in batch.values.items()}
    tensors |= {
        "present": batch.present_BVI.contiguous(),
        "factor": batch.factor_BVIF.contiguous(),
        "gap_hours": batch.gap_hours_BVI.contiguous(),
        "visit": batch.visit_BV.contiguous(),
        "ids": torch.frombuffer(bytearray(json.dumps(list(batch.ids)).encode()), dtype=torch.uint8),
    }
    return bytes(save_tensors(tensors, metadata={"schema": schema.digest()}))


def batch_from_bytes(body: bytes, schema: Schema) -> PatientBatch:
    """Inverse of :func:`batch_to_bytes`.

    Raises:
        ValueError: the bytes are torn, or belong to another schema.
    """
    try:
        tensors = load_tensors(body)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        digest = header["__metadata__"]["schema"]
        ids = tuple(json.loads(bytes(tensors["ids"].numpy().tobytes())))
        batch = PatientBatch(
            values={key: tensors[_VALUE + key] for key in schema.keys()},
            present_BVI=tensors["present"],
            factor_BVIF=tensors["factor"],
            gap_hours_BVI=tensors["gap_hours"],
            visit_BV=tensors["visit"],
            ids=ids,
        )
    except (SafetensorError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise ValueError("the patient batch file is torn or of another schema; make it again") from error
    if digest != schema.digest():
        raise ValueError(
            f"the patient batch was made for schema {digest[:12]}, this study has {schema.digest()[:12]}; make it again"
        )
    return batch
