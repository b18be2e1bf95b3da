"""The public schemas of the phantom studies: what may be recorded, in which unit and range."""

from __future__ import annotations

from medgen_models.schema import Column, Factor, Instance, Schema, Slot
from simulations import phantom_brain as brain
from simulations import phantom_chest as chest
from simulations.phantom_population import PATHOLOGIES, SEQUENCES, TRACERS, WINDOW_HOURS


def demo_schema() -> Schema:
    """The public schema of the demo study: 75 tokens a patient with the free codecs.

    >>> schema = demo_schema()
    >>> schema.keys()
    ('mri.a', 'mri.b', 'pet.fdg', 'pet.av45', 'cxr.current', 'cxr.prior', 'ehr', 'vitals', 'note')
    """
    sequence = Factor(name="sequence", levels=SEQUENCES)
    pathology = Factor(name="pathology", levels=PATHOLOGIES, column="pathology")
    tracer = Factor(name="tracer", levels=TRACERS)
    cube, millimetres = (brain.VOXELS,) * 3, (brain.VOXEL_MM,) * 3

    def number(name: str, low: float, high: float, unit: str) -> Column:
        return Column(name=name, low=low, high=high, unit=unit, missing_codes=(-1.0,))

    def label(name: str, *categories: str, aliases: dict[str, str] | None = None, outcome: bool = False) -> Column:
        return Column(name=name, kind="categorical", categories=categories, aliases=aliases or {}, outcome=outcome)

    return Schema(
        name="demo",
        slots=(
            Slot(
                name="mri",
                kind="volume",
                codec="atlas",
                shape=cube,
                voxel_mm=millimetres,
                region="brain",
                low=0.0,
                high=brain.MRI_HIGH,
                unit="a.u.",
                instances=(Instance(name="a"), Instance(name="b")),
                factors=(sequence, pathology),
                tokens=8,
                width=8,
            ),
            Slot(
                name="pet",
                kind="volume",
                codec="atlas",
                shape=cube,
                voxel_mm=millimetres,
                region="brain",
                low=0.0,
                high=brain.SUV_HIGH,
                unit="g/ml",
                instances=(
                    Instance(name="fdg", fixed={"tracer": "FDG"}),
                    Instance(name="av45", fixed={"tracer": "AV45"}),
                ),
                factors=(tracer,),
                tokens=8,
                width=8,
            ),
            Slot(
                name="cxr",
                kind="image",
                codec="atlas",
                shape=(chest.PIXELS, chest.PIXELS),
                voxel_mm=(chest.PIXEL_MM, chest.PIXEL_MM),
                region="chest",
                low=0.0,
                high=chest.CXR_HIGH,
                unit="detector units",
                instances=(Instance(name="current"), Instance(name="prior", role="reference", of="cxr.current")),
                tokens=8,
                width=8,
            ),
            Slot(
                name="ehr",
                kind="table",
                codec="table",
                columns=(
                    number("age_years", 18, 100, "years"),
                    label("sex", "F", "M", aliases={"0": "F", "1": "M", "female": "F", "male": "M"}),
                    number("bmi", 12, 60, "kg/m2"),
                    label("smoking", "never", "former", "current"),
                    label("diabetes", "no", "yes", aliases={"0": "no", "1": "yes"}),
                    number("systolic_mmhg", 60, 240, "mmHg"),
                    number("mmse", 0, 30, "points"),
                    number("adas", 0, 70, "points"),
                    label("apoe4", "0", "1", "2"),
                    number("bnp_pg_ml", 0, 2000, "pg/ml"),
                    number("creatinine_mg_dl", 0.2, 8, "mg/dl"),
                    number("crp_mg_l", 0, 300, "mg/l"),
                    label("pathology", *PATHOLOGIES),
                    label("outcome", "event_free", "death_or_readmission", outcome=True),
                ),
            ),
            Slot(
                name="vitals",
                kind="series",
                codec="series",
                hours=WINDOW_HOURS,
                bin_hours=4.0,
                columns=(
                    Column(name="heart_rate", low=30, high=200, unit="1/min"),
                    Column(name="map_mmhg", low=30, high=150, unit="mmHg"),
                    Column(name="spo2", low=60, high=100, unit="%"),
                    Column(name="temperature_c", low=33, high=42, unit="degC"),
                    Column(name="fluid_ml_h", low=-300, high=300, unit="ml/h"),
                ),
            ),
            Slot(name="note", kind="text", codec="text", tokens=1, width=16),
        ),
    )


def autoencoder_schema() -> Schema:
    """The demo's records with trained codecs: autoencoders for MRI, PET, X-ray and table instead of the free ones.

    >>> [slot.codec for slot in autoencoder_schema().slots]
    ['vae', 'vae', 'vae', 'vae', 'series', 'text']
    """
    demo = demo_schema()
    sizes = {"mri": (8, 8), "pet": (8, 8), "cxr": (8, 8), "ehr": (4, 8)}
    slots = []
    for slot in demo.slots:
        if slot.name in sizes:
            tokens, width = sizes[slot.name]
            slot = slot.model_copy(update={"codec": "vae", "tokens": tokens, "width": width})
        slots.append(slot)
    return Schema(name="autoencoders", slots=tuple(slots), max_visits=demo.max_visits)
