"""All codecs of a study together: patients to tokens and back.

On top of its codec every image instance has a *centre*, its public mean token, which encoding subtracts and decoding adds.
Recentring moves the centres by a (noised, ledgered) mean shift, so that private tokens have about zero mean again.

Shape legend: B patients, V visits, I instances, N tokens, T tokens of one instance, W token width, D vector length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from medgen_models.codecs.aekl import AeklCodec
from medgen_models.codecs.atlas import AtlasCodec
from medgen_models.codecs.base import Codec
from medgen_models.codecs.dct import DctCodec
from medgen_models.codecs.series import SeriesCodec
from medgen_models.codecs.table import TableCodec
from medgen_models.codecs.text import TextCodec
from medgen_models.codecs.vae import VaeCodec
from medgen_models.layout import Layout
from medgen_models.schema import IMAGE_KINDS, PatientBatch, Schema, Slot
from medgen_models.tokens import TokenBatch

PRESENCE = 4.0
"""Size of the presence coordinate of a recentring vector, comparable with a token vector's norm."""
_CENTRED = (*IMAGE_KINDS, "signal")


@dataclasses.dataclass(frozen=True)
class CodecBank:
    """Codecs by slot and centres by instance.

    Attributes:
        layout: of the schema.
        codecs: slot name -> codec.
        centres: instance key -> (T, W), image and signal instances only.
    """

    layout: Layout
    codecs: Mapping[str, Codec]
    centres: Mapping[str, Tensor]

    @property
    def schema(self) -> Schema:
        """The study schema."""
        return self.layout.schema

    @staticmethod
    def fit_public(
        schema: Schema,
        public: PatientBatch,
        seed: int,
        vae_steps: int = 300,
        weights: Mapping[str, Path] | None = None,
    ) -> CodecBank:
        """Fit every codec on public patients.

        Args:
            schema: the study schema.
            public: public patients; nothing private may enter here.
            seed: of autoencoder training; the same seed and data give the same bank.
            vae_steps: training steps of each ``vae`` codec.
            weights: slot name -> folder with the weights of an ``aekl`` codec.

        Raises:
            ValueError: too few public records for a fitted codec, no weights for an ``aekl`` slot, values of another shape
                or not finite, or a category that the schema does not have.
        """
        layout = Layout.of(schema)
        _check_public(layout, public)
        codecs: dict[str, Codec] = {}
        for index, slot in enumerate(schema.slots):
            records = _records(schema, slot, public)
            codecs[slot.name] = _fit(slot, records, seed * 1000 + index, vae_steps, (weights or {}).get(slot.name))
        bank = CodecBank(layout, codecs, {})
        centres = {}
        for i, (slot, _) in enumerate(layout.pairs()):
            if slot.kind in _CENTRED:
                key = layout.keys[i]
                own = public.values[key][public.present_BVI[:, :, i]]
                shape = (layout.tokens_I[i], layout.width_I[i])
                centres[key] = codecs[slot.name].encode(own).mean(dim=0) if len(own) else torch.zeros(shape)
        return dataclasses.replace(bank, centres=centres)

    @torch.no_grad()
    def encode(self, batch: PatientBatch) -> TokenBatch:
        """Tokens of ``batch``; absent instances are 0 with weight 0.

        Absent instances are encoded like all others and then left out: the shapes of every computation depend on the number
        of patients alone, so what one patient has or lacks does not change the last bits of another's tokens. Every token
        is finite whatever the values are (see :func:`medgen_models.codecs.base.bounded`): an error here would tell that
        somebody has such a record.

        Raises:
            ValueError: values of another shape than the schema's.
        """
        _check_shapes(self.layout, batch)
        out = TokenBatch.empty(self.layout, len(batch))
        z, weight = out.z_BVNW.clone(), out.weight_BVNW.clone()
        here_BVI = batch.present_BVI & batch.visit_BV[..., None]
        for i, (slot, _) in enumerate(self.layout.pairs()):
            here_BV = here_BVI[:, :, i]
            if not bool(here_BV.any()):
                continue
            key, span, width = self.layout.keys[i], self.layout.span(i), self.layout.width_I[i]
            codec, raw = self.codecs[slot.name], batch.values[self.layout.keys[i]].flatten(0, 1)
            z[:, :, span, :width][here_BV] = (codec.encode(raw) - self.centres.get(key, 0.0))[here_BV.flatten()]
            weight[:, :, span, :width][here_BV] = codec.weight(raw)[here_BV.flatten()]
        factor = batch.factor_BVIF * here_BVI[..., None]
        gap = batch.gap_hours_BVI * here_BVI
        return TokenBatch(z, weight, here_BVI, factor, gap, batch.visit_BV)

    @torch.no_grad()
    def decode(self, z_BVNW: Tensor, present_BVI: Tensor | None = None) -> dict[str, Tensor]:
        """Raw values by instance key (B, V, *raw); absent ones are empty as in :meth:`PatientBatch.empty`.

        Raises:
            ValueError: a token that is not finite.
        """
        patients, visits = z_BVNW.shape[:2]
        out = {}
        for i, (slot, _) in enumerate(self.layout.pairs()):
            key = self.layout.keys[i]
            z = z_BVNW[:, :, self.layout.span(i), : self.layout.width_I[i]].flatten(0, 1) + self.centres.get(key, 0.0)
            odd = int((~torch.isfinite(z)).flatten(1).any(dim=1).sum())
            if odd:
                raise ValueError(
                    f"instance {key}: {odd} of {len(z)} latents are not finite; decoding takes finite tokens: check the "
                    "weights that drew them, or draw with a smaller guidance"
                )
            raw = self.codecs[slot.name].decode(z).reshape(patients, visits, *slot.raw_shape())
            if slot.kind in _CENTRED:
                raw = raw.clamp(-1.0, 1.0)
            if present_BVI is not None:
                empty = float("nan") if slot.kind in ("table", "series") else 0.0
                here = present_BVI[:, :, i].reshape(patients, visits, *([1] * len(slot.raw_shape())))
                raw = torch.where(here, raw, torch.full_like(raw, empty))
            out[key] = raw
        return out

    def decode_batch(self, tokens: TokenBatch, ids: tuple[str, ...]) -> PatientBatch:
        """Patients of ``tokens`` with raw values."""
        return PatientBatch(
            values=self.decode(tokens.z_BVNW, tokens.present_BVI),
            present_BVI=tokens.present_BVI,
            factor_BVIF=tokens.factor_BVIF,
            gap_hours_BVI=tokens.gap_BVI,
            visit_BV=tokens.visit_BV,
            ids=ids,
        )

    # Recentring -------------------------------------------------------------------------------------------------------

    def mean_vectors(self, tokens: TokenBatch, slots: tuple[str, ...]) -> Tensor:
        """What the recentring query sums: (B, D), per slot the patient's mean token and a presence coordinate.

        The mean runs over the patient's own instances and visits of the slot; a patient without any contributes 0.
        The presence coordinate (:data:`PRESENCE` or 0) lets :meth:`shift_from_sum` divide by how many have the slot.
        """
        parts = []
        for name in slots:
            members = self.layout.members(name)
            here = tokens.present_BVI[:, :, list(members)].float()
            width = self.layout.width_I[members[0]]
            z = torch.stack([tokens.z_BVNW[:, :, self.layout.span(i), :width] for i in members], dim=2)
            total = (z * here[..., None, None]).sum(dim=(1, 2)).flatten(1)
            count = here.sum(dim=(1, 2))
            parts += [total / count.clamp_min(1.0)[:, None], PRESENCE * (count > 0).float()[:, None]]
        return torch.cat(parts, dim=1)

    def shift_from_sum(self, sum_D: Tensor, slots: tuple[str, ...], patients: float) -> dict[str, Tensor]:
        """Mean shift by slot (T*W) from a noised, clipped sum of :meth:`mean_vectors`.

        Args:
            sum_D: the sum over patients.
            slots: as in the query.
            patients: public size of the population summed over; the noised count of patients with the slot is kept
                between a twentieth of it and all of it, so that noise cannot blow a shift up.
        """
        shift, start = {}, 0
        for name in slots:
            i = self.layout.members(name)[0]
            size = self.layout.tokens_I[i] * self.layout.width_I[i]
            count = (sum_D[start + size] / PRESENCE).clamp(max(0.05 * patients, 1.0), max(patients, 1.0))
            shift[name] = (sum_D[start : start + size] / count).float()
            start += size + 1
        return shift

    def recentre(self, shift: Mapping[str, Tensor]) -> CodecBank:
        """A bank whose centres lie ``shift`` further: encoding subtracts it, decoding adds it.

        Args:
            shift: slot name (all its instances) or instance key -> T*W numbers, in token units.

        Raises:
            ValueError: a name that is no image slot or instance, or a shift of another length.
        """
        centres = dict(self.centres)
        for name, value in shift.items():
            keys = [name] if name in centres else [k for k in centres if k == name or k.startswith(f"{name}.")]
            if not keys:
                raise ValueError(f"recentre: {name!r} is no image slot or instance; known are {', '.join(centres)}")
            for key in keys:
                if value.numel() != centres[key].numel():
                    raise ValueError(f"recentre: {name!r} needs {centres[key].numel()} numbers, got {value.numel()}")
                centres[key] = centres[key] + value.reshape(centres[key].shape)
        return dataclasses.replace(self, centres=centres)

    # Autoencoders -----------------------------------------------------------------------------------------------------

    def vae_slots(self) -> tuple[str, ...]:
        """Slots whose codec is an autoencoder."""
        return tuple(name for name, codec in self.codecs.items() if isinstance(codec, VaeCodec))

    def _vae(self, slot: str) -> VaeCodec:
        codec = self.codecs.get(slot)
        if not isinstance(codec, VaeCodec):
            raise ValueError(f"slot {slot!r} has no vae codec; slots with one: {', '.join(self.vae_slots()) or 'none'}")
        return codec

    def vae_parameters(self, slots: tuple[str, ...]) -> dict[str, Tensor]:
        """Trainable weights of the autoencoders of ``slots``, named ``codec.<slot>.<weight>``."""
        return {f"codec.{s}.{name}": value.clone() for s in slots for name, value in self._vae(s).parameters().items()}

    def vae_units(self, batch: PatientBatch, slots: tuple[str, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """Patient-leading units for :meth:`make_vae_loss`: records, weights, presence and latent noise of each slot."""
        units = {}
        for name in slots:
            codec, members = self._vae(name), self.layout.members(name)
            raw = torch.stack([batch.values[self.layout.keys[i]] for i in members], dim=2).flatten(1, 2)
            here = (batch.present_BVI & batch.visit_BV[..., None])[:, :, list(members)].flatten(1, 2)
            x, weight = codec.features(raw.flatten(0, 1))
            units[f"{name}.x"] = x.reshape(*here.shape, -1)
            units[f"{name}.weight"] = weight.reshape(*here.shape, -1)
            units[f"{name}.present"] = here
            units[f"{name}.noise"] = torch.randn(*here.shape, codec.net.latent, generator=generator)
        return units

    def make_vae_loss(self, slots: tuple[str, ...]) -> Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]:
        """``loss(params, unit)``: the sum over ``slots`` of one patient's mean loss; params as :meth:`vae_parameters`."""
        nets = {name: self._vae(name).net for name in slots}

        def unit_loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
            total = torch.zeros(())
            for name, net in nets.items():
                prefix = f"codec.{name}."
                own = {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}
                records = (unit[f"{name}.x"], unit[f"{name}.weight"], unit[f"{name}.noise"])
                loss_J = torch.func.functional_call(net, own, records)
                here_J = unit[f"{name}.present"].to(loss_J.dtype)
                total = total + (loss_J * here_J).sum() / here_J.sum().clamp_min(1.0)
            return total

        return unit_loss

    def with_vae(self, parameters: Mapping[str, Tensor]) -> CodecBank:
        """The bank with other autoencoder weights, named as in :meth:`vae_parameters`; scales and centres stay."""
        codecs = dict(self.codecs)
        for name in self.vae_slots():
            prefix = f"codec.{name}."
            own = {key.removeprefix(prefix): value for key, value in parameters.items() if key.startswith(prefix)}
            codecs[name] = self._vae(name).with_parameters(self.schema.slot(name), own)
        return dataclasses.replace(self, codecs=codecs)

    # Storage ----------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All public arrays, named ``codec.<slot>.<array>`` and ``centre.<instance>``."""
        out = {f"codec.{s}.{name}": t for s, codec in self.codecs.items() for name, t in codec.tensors().items()}
        return {
            name: t.detach().contiguous()
            for name, t in (out | {f"centre.{k}": t for k, t in self.centres.items()}).items()
        }

    @staticmethod
    def from_tensors(schema: Schema, tensors: Mapping[str, Tensor]) -> CodecBank:
        """Inverse of :meth:`tensors`.

        Raises:
            ValueError: arrays are missing, or belong to another schema.
        """
        layout = Layout.of(schema)
        codecs: dict[str, Codec] = {}
        for slot in schema.slots:
            prefix = f"codec.{slot.name}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            try:
                codecs[slot.name] = _restore(slot, own)
            except (KeyError, RuntimeError) as error:
                raise ValueError(
                    f"slot {slot.name}: its codec arrays are missing or of another schema ({error})"
                ) from error
        centres = {key.removeprefix("centre."): value for key, value in tensors.items() if key.startswith("centre.")}
        return CodecBank(layout, codecs, centres)


def _check_shapes(layout: Layout, batch: PatientBatch) -> None:
    for i, (slot, _) in enumerate(layout.pairs()):
        found = tuple(batch.values[layout.keys[i]].shape[2:])
        if found != slot.raw_shape():
            raise ValueError(
                f"instance {layout.keys[i]}: expected records of shape {slot.raw_shape()}, got {found}; resample them to the "
                "schema's public grid"
            )


def _check_public(layout: Layout, public: PatientBatch) -> None:
    """Public records may be named; NaN is how a table or series says missing, and no other value may be like it."""
    _check_shapes(layout, public)
    for i, (slot, _) in enumerate(layout.pairs()):
        key, own = layout.keys[i], public.values[layout.keys[i]][public.present_BVI[:, :, i]]
        bad = torch.isinf(own) if slot.kind in ("table", "series") else ~torch.isfinite(own)
        if bool(bad.any()):
            count = int(bad.flatten(1).any(dim=1).sum())
            raise ValueError(f"instance {key}: {count} public records hold values that are not finite; leave them out")
        for c, column in enumerate(slot.columns if slot.kind == "table" else ()):
            level = own[:, c][torch.isfinite(own[:, c])]
            unknown = level[(level < 0) | (level >= column.width) | (level != level.round())]
            if column.kind == "categorical" and len(unknown):
                raise ValueError(
                    f"column {column.name}: unknown category {float(unknown[0]):g}; levels count from 0 to "
                    f"{column.width - 1} ({', '.join(column.categories)}): add the category or map it by an alias"
                )


def _records(schema: Schema, slot: Slot, batch: PatientBatch) -> Tensor:
    """All present records of a slot (R, *raw)."""
    layout = Layout.of(schema)
    here = batch.present_BVI & batch.visit_BV[..., None]
    return torch.cat([batch.values[layout.keys[i]][here[:, :, i]] for i in layout.members(slot.name)])


def _fit(slot: Slot, records: Tensor, seed: int, vae_steps: int, weights: Path | None) -> Codec:
    match slot.codec:
        case "dct":
            return DctCodec.fit(slot, records)
        case "atlas":
            return AtlasCodec.fit(slot, records)
        case "vae":
            return VaeCodec.fit(slot, records, vae_steps, seed)
        case "aekl":
            if weights is None:
                raise ValueError(f'slot {slot.name}: codec "aekl" needs the folder of its weights')
            return AeklCodec.from_folder(slot, weights).scaled(records)
        case "table":
            return TableCodec.fit(slot, records)
        case "series":
            return SeriesCodec.fit(slot, records)
        case "text":
            return TextCodec.of(slot)


def _restore(slot: Slot, tensors: dict[str, Tensor]) -> Codec:
    match slot.codec:
        case "dct":
            return DctCodec.from_tensors(slot, tensors)
        case "atlas":
            return AtlasCodec.from_tensors(slot, tensors)
        case "vae":
            return VaeCodec.from_tensors(slot, tensors)
        case "aekl":
            return AeklCodec.from_tensors(slot, tensors)
        case "table":
            return TableCodec.from_tensors(slot, tensors)
        case "series":
            return SeriesCodec.from_tensors(slot, tensors)
        case "text":
            return TextCodec.of(slot)
