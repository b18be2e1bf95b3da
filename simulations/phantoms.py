"""Phantom patients: a known joint distribution over MRI, PET, chest films, table, vitals, notes and outcome.

The public face of the phantoms::

    population = make_patients(600, seed=7)                 # in the units of hospital files
    batch = to_batch(demo_schema(), population)             # the tensor record that models train on
    measured = attributes(demo_schema(), batch)             # ventricles, uptake ratios, heart, fluid: from images only
    contact_sheet(demo_schema(), batch, Path("sheet.png"))  # for human eyes

What is known to hold, and tested: cognition falls with ventricle size and FDG uptake; BNP rises with the heart's width
(and exponentially with its load); the fluid balance between two films moves effusion and congestion; AV45 is bimodal
and partly discordant with cognition; CRP is bimodal; systolic pressure rises and then falls with cardiac load; values
are missing not at random; who lives alone stands in the note only and raises the risk of the outcome.
"""

from __future__ import annotations

from simulations.phantom_attributes import ATTRIBUTES, attributes, biomarkers
from simulations.phantom_batch import to_batch
from simulations.phantom_patients import Phantoms, make_patients
from simulations.phantom_population import PATHOLOGIES, SEQUENCES, TRACERS, Latents, Profile
from simulations.phantom_schema import autoencoder_schema, demo_schema
from simulations.phantom_sheet import contact_sheet

__all__ = [
    "ATTRIBUTES",
    "PATHOLOGIES",
    "SEQUENCES",
    "TRACERS",
    "Latents",
    "Phantoms",
    "Profile",
    "attributes",
    "autoencoder_schema",
    "biomarkers",
    "contact_sheet",
    "demo_schema",
    "make_patients",
    "to_batch",
]
