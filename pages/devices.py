"""Devices: on which a model fits, how fast it would be there, what such predictions are worth, and one's own to measure on."""

from __future__ import annotations

import streamlit as st

from app import state
from app.components.fits_panel import fits_panel
from app.components.heading import About, Reproduction, heading
from app.components.import_panel import import_panel
from app.components.own_devices import own_devices
from app.components.registry_panel import registry_panel
from app.components.track_panel import track_panel

ABOUT = About(
    "A device is predicted from what it has: memory, bandwidth, multiplications per second. A step reads its weights and "
    "cache once and does its multiplications; what share of its peaks a class of devices reaches is learned from published "
    "rates, and your own measurements on a device scale what is said of it.\n\n"
    "Every prediction carries the band in which nine of ten past ones would have been right, each made without the device "
    "it was of; the track record shows all of them.\n\n"
    "Weights that are too big and a context that is too long are told apart, because only the second is yours to shorten.",
    r"t = \max\!\left(\tfrac{\text{weights} + \text{cache}}{\eta\,\text{bandwidth}},\ "
    r"\tfrac{\text{FLOP}}{\eta'\,\text{peak}}\right) + n_\text{layers}\,t_\text{layer}",
    "https://doi.org/10.1145/1498765.1498785",
)
REPRODUCE = Reproduction(
    "from core.catalog.store import Catalog\n"
    "from core.predict.fits import fits_on\n"
    "from core.predict.track_record import median_error, track_record\n\n"
    'print(fits_on(Catalog(read_only=True), "VARIANT"))\n'
    "print(median_error(track_record()))",
    "slimscope predict variant:ID --json\nslimscope predict --track-record device --json",
)
PARTS = {
    "fits": ("Fits on…", fits_panel),
    "registry": ("Registry", registry_panel),
    "record": ("Track record", track_panel),
    "own": ("Your devices", own_devices),
    "import": ("Import", import_panel),
}

heading("Devices", about=ABOUT, reproduce=REPRODUCE)
part = state.choice(
    st.segmented_control,
    "Part",
    {name: title for name, (title, _) in PARTS.items()},
    key="part",
    default="fits",
    required=True,
    label_visibility="collapsed",
)
PARTS[part][1]()
