"""How alike two images are: what is left of them once everybody's anatomy is taken away, compared over small shifts.

Two chest films of strangers correlate at 0.9 because both are chests. So each image is brought to zero mean and unit
spread, moved onto the mean image of a reference, and has that mean taken away; a filter then gives every scale of the rest
the same weight (the inverse amplitude spectrum of the reference's rests), so that what only one person has decides.

Shape legend: N, G images · (D, ...) axes of an image · F features · K candidates

Covered
    - 2-D and 3-D images of one shape: brightness and contrast, noise, blur, shifts of about a tenth of the side, small crops,
      mirror images along any axis. No weights are learned; a reference of a dozen images is enough for the filter.
    - Single slices of a volume along its last axis.

Not covered
    - Rotations above a few degrees, warps, and a copied part of a 2-D image: these are found only as far as what is left
      is still alike. Detail finer than the working grid (64 a side for films, 32 for volumes): a single slice of more
      than 32 is averaged with those beside it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy import fft

Pixels = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

SIDE = {2: 64, 3: 32}
"""Longest side of the working grid for films and for volumes."""
_RIDGE = 0.1  # of the mean power: what a scale without power counts for
_QUIET = 0.5  # of the usual size of a rest: below it, likeness fades instead of comparing noise
_BLOCK_NUMBERS = 2**23  # of one block of images: 32 MiB of float32
_ZOOMS = (0.9, 0.95, 1.05)


@dataclasses.dataclass(frozen=True)
class _Filter:
    """Equal weight for every scale of the rests, above a smallest scale."""

    weight: npt.NDArray[np.float32]  # of the real Fourier transform
    floor: float

    @classmethod
    def of(cls, rest_N: Pixels, smallest: float) -> _Filter:
        """Fitted to rests.

        Args:
            rest_N: (N, D, ...) rests of the reference.
            smallest: standard deviation of the Gaussian that hides finer detail, in pixels.
        """
        shape = rest_N.shape[1:]
        axes = tuple(range(1, rest_N.ndim))
        power = np.mean([(np.abs(fft.rfftn(block, axes=axes)) ** 2).mean(axis=0) for block in np.array_split(
            rest_N, max(1, rest_N.size // _BLOCK_NUMBERS))], axis=0)  # fmt: skip
        squared = np.zeros(power.shape)
        for axis, size in enumerate(shape):
            steps = fft.rfftfreq(size) if axis == len(shape) - 1 else fft.fftfreq(size)
            squared = squared + steps.reshape([-1 if other == axis else 1 for other in range(len(shape))]) ** 2
        level = power.mean()
        flat = 1 / np.sqrt(power + _RIDGE * level) if level > 0 else np.ones(power.shape)
        made = cls((flat * np.exp(-2 * (math.pi * smallest) ** 2 * squared)).astype(np.float32), 0.0)
        sizes = np.concatenate([_norms(made(block)) for block in blocks(rest_N)])
        return dataclasses.replace(made, floor=_QUIET * float(np.sqrt((sizes**2).mean())))

    def __call__(self, rest_N: Pixels) -> Pixels:
        axes = tuple(range(1, rest_N.ndim))
        filtered = fft.irfftn(fft.rfftn(rest_N, axes=axes) * self.weight, s=rest_N.shape[1:], axes=axes)
        return np.asarray(filtered, np.float32)


@dataclasses.dataclass(frozen=True)
class Likeness:
    """A reference's mean image and filters, which make two images comparable.

    Attributes:
        shape: of the images as given.
        step: pixels of the given image per pixel of the working grid, along each axis.
        mean: (D, ...) mean of the reference, each image with zero mean and unit spread, on the working grid.
        coarse, sharp, slicewise: filters of features, of the registered comparison, and of single slices.
        places_S: (slices, ...) mean of every slice of volumes, each with zero mean and unit spread.
    """

    shape: tuple[int, ...]
    step: tuple[int, ...]
    mean: Pixels
    coarse: _Filter
    sharp: _Filter
    slicewise: _Filter | None
    places_S: Pixels

    @classmethod
    def of(cls, reference_N: npt.ArrayLike) -> Likeness:
        """Fit to images that do not say who is a member: public ones, or members and held-out patients together.

        Args:
            reference_N: (N, D, ...) images, two or more.

        Raises:
            ValueError: not 2-D or 3-D images, fewer than two, a number that is not finite, or all the same everywhere.
        """
        reference = np.asarray(reference_N)
        if reference.ndim not in (3, 4) or min(reference.shape[1:]) < 8:
            raise ValueError(f"expected 2-D or 3-D images of 8 pixels a side or more, got shape {reference.shape[1:]}")
        if len(reference) < 2:
            raise ValueError(f"expected two reference images or more, got {len(reference)}; give more of them")
        step = step_of(reference.shape[1:])
        work = _working(reference, step)
        if not work.any():
            raise ValueError("every reference image is the same everywhere; there is nothing to compare")
        mean = work.mean(axis=0)
        for _ in range(2):
            work = _aligned(work, mean)
            mean = work.mean(axis=0)
        grain = max(mean.shape) / 64
        rest = (work - mean) * _fade(mean.shape)
        slices, places = None, np.zeros((0, *mean.shape[:-1]), np.float32)
        if mean.ndim == 3:
            flat = np.moveaxis(work, -1, 0)
            places = np.stack([_standard(own).mean(axis=0) for own in flat])
            rests = [(_aligned(_standard(own), place) - place) for own, place in zip(flat, places, strict=True)]
            slices = _Filter.of(np.concatenate(rests) * _fade(mean.shape[:2]), 2 * grain)
        shape = tuple(reference.shape[1:])
        return cls(shape, step, mean, _Filter.of(rest, 2 * grain), _Filter.of(rest, 1.2 * grain), slices, places)

    @property
    def reach(self) -> int:
        """Largest shift that the registered comparison tries, in pixels of the working grid."""
        return max(1, int(max(self.mean.shape)) // 10)

    def view(self, images_N: npt.ArrayLike) -> Pixels:
        """Images on the working grid, with zero mean and unit spread, moved onto the mean image.

        Raises:
            ValueError: images of another shape than the reference, or a number that is not finite.
        """
        images = np.asarray(images_N)
        if images.shape[1:] != self.shape:
            raise ValueError(
                f"expected images of shape {self.shape}, got {images.shape[1:]}; resample them to one grid"
            )
        out = np.empty((len(images), *self.mean.shape), np.float32)
        for rows in _row_blocks(len(images), max(self.mean.size, math.prod(self.shape))):
            out[rows] = _aligned(_working(images[rows], self.step), self.mean)
        return out

    def features(self, view_N: Pixels) -> Pixels:
        """(N, F) features of length one or less: their product is the likeness of two images."""
        every = (slice(None), *(slice(None, None, max(1, max(self.mean.shape) // 16)),) * self.mean.ndim)
        out = [self.coarse(self.rest(block))[every].reshape(len(block), -1) for block in blocks(view_N)]
        thinned = np.concatenate(out)
        scale = math.sqrt(thinned.shape[1] / self.mean.size)
        return _unit(thinned, self.coarse.floor * scale)

    def slices(self, view_N: Pixels) -> Pixels:
        """(slices, N, F) features of every slice of volumes along the last axis, each moved onto its place by itself."""
        if self.slicewise is None:
            raise ValueError("only volumes have slices")
        every = max(1, max(self.mean.shape) // 16)
        out = []
        for number, place in enumerate(self.places_S):
            parts = []
            for block in blocks(view_N[..., number]):
                own = _standard(block)
                rest = (_aligned(own, place) - place) * _fade(place.shape) * _there(own)
                parts.append(self.slicewise(rest)[:, ::every, ::every].reshape(len(block), -1))
            out.append(np.concatenate(parts))
        found = np.stack(out)
        scale = math.sqrt(found.shape[2] / math.prod(self.mean.shape[:2]))
        return _unit(found, self.slicewise.floor * scale)

    def rest(self, view_N: Pixels) -> Pixels:
        """What is left of each image without the mean, fading at the border; nothing of one that is the same everywhere."""
        return np.asarray((view_N - self.mean) * _fade(self.mean.shape) * _there(view_N), np.float32)

    def registered(self, first_K: Pixels, second_K: Pixels) -> Floats:
        """Correlation of the filtered rests of pairs of views, (K,): the best over shifts of the second.

        The second is shifted before the mean is taken away, by algebra: sums over the frame are products of spectra. The
        frame leaves out a border as wide as the largest shift. Source: the registration of Kuglin & Hines (1975), with
        the spectrum of many images in place of the pair's own.
        """
        axes = tuple(range(1, first_K.ndim))
        frame = _frame(self.mean.shape, self.reach)
        mean = self.sharp(self.mean[None])
        first, second = self.sharp(first_K) - mean, self.sharp(second_K)

        def total(values: Pixels) -> Floats:
            return np.asarray(values.sum(axis=axes, keepdims=True, dtype=np.float64))

        def moved(values: Pixels, fixed: Pixels) -> Floats:
            """Sums over the image of ``fixed`` times ``values``, shifted by every shift."""
            product = fft.rfftn(values, axes=axes).conj() * fft.rfftn(fixed, axes=axes)
            return np.asarray(fft.irfftn(product, s=self.mean.shape, axes=axes), np.float64)

        size_first = np.sqrt(total(first**2 * frame))
        squared = moved(second**2, frame[None]) - 2 * moved(second, mean * frame) + total(mean**2 * frame)
        size_second = np.sqrt(np.maximum(squared, 0.0))
        product = moved(second, first * frame) - total(first * mean * frame)
        floor = self.sharp.floor
        found = product / (np.maximum(size_first, floor) * np.maximum(size_second, floor))
        for axis in axes:
            found = np.take(found, _near(self.reach, found.shape[axis]), axis=axis)
        best = found.reshape(len(found), -1).max(axis=1)
        return np.asarray(best * (_there(first_K) & _there(second_K)).ravel(), np.float64)

    def variants(self) -> range:
        """Numbers of the forms in which :meth:`variant` shows an image again; the first is the image itself."""
        return range(2 + self.mean.ndim + len(_ZOOMS))

    def variant(self, view_N: Pixels, number: int, common: Pixels) -> Pixels:
        """Views as they are, mirrored along one axis, a little smaller or larger, or without their cohort's manner.

        Args:
            view_N: views of a cohort.
            number: which form.
            common: mean of all of the cohort's views. The last form has the reference's mean in its place, so that what a
                generator does to every image (blur, contrast) hides no copy.
        """
        if number == 0:
            return view_N
        if number == self.variants()[-1]:
            return np.asarray(view_N + (self.mean - common) * _there(view_N), np.float32)
        if number <= self.mean.ndim:
            return _aligned(np.flip(view_N, axis=number), self.mean)
        return _aligned(_zoomed(view_N, _ZOOMS[number - 1 - self.mean.ndim]), self.mean)


def blocks(images_N: Pixels) -> Iterator[Pixels]:
    """Blocks of images of bounded memory."""
    for rows in _row_blocks(len(images_N), math.prod(images_N.shape[1:])):
        yield images_N[rows]


def _row_blocks(images: int, numbers: int) -> Iterator[slice]:
    step = max(1, _BLOCK_NUMBERS // max(1, numbers))
    for start in range(0, images, step):
        yield slice(start, min(start + step, images))


def _norms(images_N: Pixels) -> Floats:
    return np.asarray(np.sqrt((images_N.reshape(len(images_N), -1).astype(np.float64) ** 2).sum(axis=1)))


def _unit(features: Pixels, floor: float) -> Pixels:
    sizes = np.sqrt((features.astype(np.float64) ** 2).sum(axis=-1, keepdims=True))
    return np.asarray(features / np.maximum(np.maximum(sizes, floor), 1e-12), np.float32)


def step_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Pixels per pixel of the working grid along each axis, for images of this shape."""
    return tuple(math.ceil(size / SIDE[len(shape)]) for size in shape)


def reduced(images_N: npt.NDArray[np.generic], step: tuple[int, ...]) -> Pixels:
    """Means of blocks of ``step`` pixels; the edge is repeated where they do not divide an axis."""
    out = np.asarray(images_N, np.float32)
    for axis, width in enumerate(step, start=1):
        if width == 1:
            continue
        short = -out.shape[axis] % width
        if short:
            out = np.pad(out, [(0, short if other == axis else 0) for other in range(out.ndim)], mode="edge")
        out = out.reshape(*out.shape[:axis], -1, width, *out.shape[axis + 1 :]).mean(axis=axis + 1)
    return out


def _working(images_N: npt.NDArray[np.generic], step: tuple[int, ...]) -> Pixels:
    """Reduced to the working grid and standardised."""
    images = np.asarray(images_N, np.float32)
    if not np.isfinite(images).all():
        raise ValueError("an image holds a number that is not finite; correct it or leave it out")
    return _standard(reduced(images, step))


def _standard(images_N: Pixels) -> Pixels:
    """Zero mean and unit spread; an image that is the same everywhere becomes zero."""
    axes = tuple(range(1, images_N.ndim))
    mean, spread = (f(images_N, axis=axes, keepdims=True, dtype=np.float64) for f in (np.mean, np.std))
    safe = spread > 1e-6 * np.maximum(np.abs(mean), 1e-30)
    return np.asarray(np.where(safe, (images_N - mean) / np.where(safe, spread, 1.0), 0.0), np.float32)


def _there(images_N: Pixels) -> npt.NDArray[np.bool_]:
    """Which images are not blank, with axes kept."""
    return np.asarray(images_N.any(axis=tuple(range(1, images_N.ndim)), keepdims=True))


def _fade(shape: tuple[int, ...]) -> Pixels:
    """One inside, falling to zero at the border over an eighth of each side: what is shifted in there is nobody's."""
    out = np.ones(shape, np.float32)
    for axis, size in enumerate(shape):
        depth = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
        edge = np.sin(np.pi / 2 * np.minimum(depth / max(1, size // 8), 1.0)) ** 2
        out *= edge.astype(np.float32).reshape([-1 if other == axis else 1 for other in range(len(shape))])
    return out


def _frame(shape: tuple[int, ...], border: int) -> Pixels:
    """One inside, zero on a border."""
    out = np.zeros(shape, np.float32)
    out[tuple(slice(border, size - border) for size in shape)] = 1
    return out


def _near(reach: int, size: int) -> npt.NDArray[np.int64]:
    """Shifts of at most ``reach``, as places of a circular axis."""
    return np.unique(np.arange(-reach, reach + 1) % size)


def _aligned(images_N: Pixels, mean: Pixels) -> Pixels:
    """Each image shifted by whole pixels, at most an eighth of the side, to where it fits the mean best."""
    axes = tuple(range(1, images_N.ndim))
    target = fft.rfftn(mean * _fade(mean.shape))
    out = np.empty_like(images_N)
    for rows in _row_blocks(len(images_N), mean.size):
        block = images_N[rows]
        fit = fft.irfftn(fft.rfftn(block, axes=axes).conj() * target, s=mean.shape, axes=axes)
        places = [_near(max(1, size // 8), size) for size in mean.shape]
        best = fit[np.ix_(np.arange(len(block)), *places)].reshape(len(block), -1).argmax(axis=1)
        shifts = np.unravel_index(best, [len(place) for place in places])
        moves = [place[chosen] for place, chosen in zip(places, shifts, strict=True)]
        signed = [np.where(move > size // 2, move - size, move) for move, size in zip(moves, mean.shape, strict=True)]
        moved = block
        for axis, move in enumerate(signed):
            grid = np.clip(np.arange(mean.shape[axis]) - move[:, None], 0, mean.shape[axis] - 1)
            shape = [len(block), *(mean.shape[axis] if other == axis else 1 for other in range(mean.ndim))]
            moved = np.take_along_axis(moved, grid.reshape(shape), axis=axis + 1)
        out[rows] = _standard(moved)
    return out


def _zoomed(images_N: Pixels, factor: float) -> Pixels:
    """Enlarged about the centre by linear interpolation; the edge is repeated."""
    out = images_N
    for axis in range(1, images_N.ndim):
        size = images_N.shape[axis]
        place = np.clip((np.arange(size) - (size - 1) / 2) / factor + (size - 1) / 2, 0, size - 1)
        low = np.minimum(np.floor(place).astype(np.int64), size - 2)
        share = (place - low).astype(np.float32).reshape([-1 if o == axis else 1 for o in range(images_N.ndim)])
        out = np.take(out, low, axis=axis) * (1 - share) + np.take(out, low + 1, axis=axis) * share
    return np.asarray(out, np.float32)


def neighbouring(slices: int) -> Iterator[tuple[int, int]]:
    """Pairs of slices that may show the same place: the same number, and one to either side."""
    for first, second in itertools.product(range(slices), (-1, 0, 1)):
        if 0 <= first + second < slices:
            yield first, first + second
