"""Plot style: nothing -> colours and markers that tell the lines of a picture apart."""

from __future__ import annotations

# Okabe and Ito's colours, which the colour-blind can tell apart; the markers differ too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999933")
MARKERS = "osD^vPX"
