"""Terms that couple patients or need a second network: for public pre-training only, and off unless asked for.

A contrastive term compares every patient with every other, a discriminator is trained on all of them: neither has one
value per patient, so neither can be clipped per patient, and no private step may reach this module. Only
:mod:`medgen_models.pretrain` imports it. No weights are fetched: features come from a file that the user names, or from
a network drawn from a seed, which also tells texture from blur.

Shape legend: B patients or records, I instances, N tokens, E model width, D numbers of a record.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from medgen_models.codecs.bank import CodecBank
from medgen_models.codecs.vae import VaeCodec
from medgen_models.core import ABSENT, GIVEN, TokenCore
from medgen_models.schema import IMAGE_KINDS, PatientBatch, Slot
from medgen_models.tokens import TokenBatch

TEMPERATURE = 0.1
_RATE = 5e-4
_BATCH = 16


@dataclasses.dataclass(frozen=True)
class PublicTerms:
    """Weights of the public-only terms; 0 leaves one out, and its cost.

    Attributes:
        contrastive: on the core, InfoNCE between what a patient's images say and what the rest of the record says.
        adversarial, perceptual: on image autoencoders, in ``refine_steps`` further steps after their own training.
        perceptual_weights: safetensors file of a :class:`PerceptualNet`; empty draws it from the seed.
    """

    contrastive: float = 0.0
    adversarial: float = 0.0
    perceptual: float = 0.0
    perceptual_weights: str = ""
    refine_steps: int = 200

    def __post_init__(self) -> None:
        """Refuse negative weights."""
        if min(self.contrastive, self.adversarial, self.perceptual) < 0 or self.refine_steps < 1:
            raise ValueError(f"public terms: expected weights >= 0 and refine_steps >= 1, got {self}; change them")


def info_nce(a_BE: Tensor, b_BE: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Symmetric InfoNCE (van den Oord et al. (2018), eq. 4, both ways): each row of ``a`` belongs to its row of ``b``.

    log B for rows that tell nothing; 0 for fewer than two rows, between which there is nothing to choose.
    """
    if len(a_BE) < 2:
        return a_BE.sum() * 0.0
    a, b = nn.functional.normalize(a_BE, dim=-1), nn.functional.normalize(b_BE, dim=-1)
    logits_BB = a @ b.mT / temperature
    truth = torch.arange(len(a), device=a.device)
    return 0.5 * (nn.functional.cross_entropy(logits_BB, truth) + nn.functional.cross_entropy(logits_BB.mT, truth))


def contrastive_loss(core: TokenCore, tokens: TokenBatch) -> Tensor:
    """InfoNCE between the register after the images alone and after the rest alone, over first visits that have both."""
    layout = core.layout
    image_I = torch.tensor(layout.of_kind(*IMAGE_KINDS))
    here_BI = tokens.present_BVI[:, 0]
    rows = ((here_BI & image_I).any(-1) & (here_BI & ~image_I).any(-1)).nonzero().flatten()
    if len(rows) < 2:
        return torch.zeros(())
    own = tokens.select(rows)
    device = next(core.parameters()).device
    images, rest = (torch.where(here_BI[rows] & side_I, GIVEN, ABSENT) for side_I in (image_I, ~image_I))
    loss = info_nce(_register(core, own, images, device), _register(core, own, rest, device))
    return loss.to("cpu", torch.float32)


def _register(core: TokenCore, tokens: TokenBatch, state_BI: Tensor, device: torch.device) -> Tensor:
    """What the register token holds after the last layer (B, E)."""
    kept: list[Tensor] = []
    hook = core.trunk.norm.register_forward_hook(lambda _module, _inputs, out: kept.append(out[:, 0]))
    try:
        inputs = (
            tokens.z_BVNW[:, 0],
            state_BI,
            torch.zeros(state_BI.shape),
            tokens.factor_BVIF[:, 0],
            tokens.gap_BVI[:, 0],
        )
        core(*(value.to(device) for value in inputs))
    finally:
        hook.remove()
    return kept[0]


class PerceptualNet(nn.Module):
    """Three strided convolutions whose activations are compared; in 2-D or 3-D, one input channel.

    Args:
        axes: 2 or 3.
        generator: draws the weights.
    """

    def __init__(self, axes: int, generator: torch.Generator) -> None:
        super().__init__()
        kind, widths = (nn.Conv3d if axes == 3 else nn.Conv2d), (1, 16, 32, 64)
        self.layers = nn.ModuleList(
            cast(nn.Module, nn.utils.skip_init(kind, a, b, kernel_size=3, stride=2, padding=1))  # type: ignore[no-untyped-call]
            for a, b in itertools.pairwise(widths)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, (2.0 / parameter[0].numel()) ** 0.5, generator=generator)
                else:
                    parameter.zero_()
        self.requires_grad_(False)

    @staticmethod
    def of(axes: int, seed: int, weights: str) -> PerceptualNet:
        """From a file, or drawn from ``seed`` where none is named.

        Raises:
            ValueError: the file is missing or of another network.
        """
        net = PerceptualNet(axes, torch.Generator().manual_seed(seed))
        if weights:
            try:
                net.load_state_dict(load_file(Path(weights)))
            except (OSError, SafetensorError, RuntimeError) as error:
                raise ValueError(
                    f"perceptual weights {weights}: no weights of a {axes}-D PerceptualNet ({error}); name another file"
                ) from error
        return net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair of images (B,): mean squared difference of channel-normalised activations, summed over
        layers (Zhang et al. (2018), eq. 1, without learned weights).
        """
        total = torch.zeros(len(x))
        for layer in self.layers:
            x, y = nn.functional.relu(layer(x)), nn.functional.relu(layer(y))
            apart = nn.functional.normalize(x, dim=1) - nn.functional.normalize(y, dim=1)
            total = total + apart.square().sum(1).flatten(1).mean(1)
        return total


def refined_bank(bank: CodecBank, public: PatientBatch, terms: PublicTerms, seed: int) -> CodecBank:
    """The bank with its image autoencoders trained on under the adversarial and perceptual terms, centres anew."""
    codecs, centres = dict(bank.codecs), dict(bank.centres)
    for number, name in enumerate(bank.vae_slots()):
        codec, slot = bank.codecs[name], bank.schema.slot(name)
        if not isinstance(codec, VaeCodec) or slot.kind not in IMAGE_KINDS:
            continue
        members = bank.layout.members(name)
        here = public.present_BVI & public.visit_BV[..., None]
        records = [public.values[bank.layout.keys[i]][here[:, :, i]] for i in members]
        codecs[name] = refined(codec, slot, torch.cat(records), terms, seed * 1000 + number)
        for i, own in zip(members, records, strict=True):
            if len(own):
                centres[bank.layout.keys[i]] = codecs[name].encode(own).mean(dim=0)
    return dataclasses.replace(bank, codecs=codecs, centres=centres)


def refined(codec: VaeCodec, slot: Slot, records: Tensor, terms: PublicTerms, seed: int) -> VaeCodec:
    """An image autoencoder after ``terms.refine_steps`` steps with a patch discriminator and perceptual distance.

    The discriminator has group norms (a batch norm would tie records together) and the hinge losses of Lim and Ye (2017);
    its weight is fixed, not adapted to gradient norms.
    """
    net, shape = copy.deepcopy(codec.net).requires_grad_(True), slot.shape
    generator = torch.Generator().manual_seed(seed)
    critic = _critic(shape, seed)
    features = PerceptualNet.of(len(shape), seed, terms.perceptual_weights)
    own = torch.optim.AdamW(net.parameters(), lr=_RATE, betas=(0.5, 0.9), weight_decay=0.0, foreach=True)
    other = torch.optim.AdamW(critic.parameters(), lr=_RATE, betas=(0.5, 0.9), weight_decay=0.0, foreach=True)
    x_BD, weight_BD = codec.features(records)
    for _ in range(terms.refine_steps):
        rows = torch.randint(len(x_BD), (min(_BATCH, len(x_BD)),), generator=generator)
        real = x_BD[rows]
        noise = torch.randn(len(rows), net.latent, generator=generator)
        made = net.reconstruct(net.posterior(real)[0])
        real_image, made_image = real.reshape(-1, 1, *shape), made.reshape(-1, 1, *shape)
        loss = net(real, weight_BD[rows], noise).mean()
        if terms.perceptual:
            loss = loss + terms.perceptual * features(made_image, real_image).mean()
        if terms.adversarial:
            loss = loss - terms.adversarial * critic(made_image)[-1].mean()
        own.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        own.step()
        if terms.adversarial:
            says_real, says_made = critic(real_image)[-1], critic(made_image.detach())[-1]
            wrong = torch.relu(1.0 - says_real).mean() + torch.relu(1.0 + says_made).mean()
            other.zero_grad()
            wrong.backward()  # type: ignore[no-untyped-call]
            other.step()
    trained = codec.with_parameters(slot, {name: value.detach() for name, value in net.named_parameters()})
    spread = trained.encode(records).flatten(1).std(dim=0).clamp_min(0.05)
    return dataclasses.replace(trained, scale_R=trained.scale_R * spread)


def _critic(shape: tuple[int, ...], seed: int) -> nn.Module:
    """MONAI's patch discriminator with group norms; its constructor draws from the global generator, which is restored."""
    from monai.networks.nets.patchgan_discriminator import (
        PatchDiscriminator,
    )  # heavy import, only where a discriminator is asked for

    depth = 2 if min(shape) >= 16 else 1  # each halves the grid once more
    norm: Any = ("GROUP", {"num_groups": 4})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(
            nn.Module, PatchDiscriminator(len(shape), channels=16, in_channels=1, num_layers_d=depth, norm=norm)
        )
