"""The protocols that write files or tables of their own: which function does it."""

from protocols.energy_figures import draw_energy
from protocols.features import write_features
from protocols.figures import draw_pictures
from protocols.finola_figures import draw_finola
from protocols.hypergradient import draw_hypergradient
from protocols.layers import draw_layers
from protocols.relatives import draw_relatives

DRAWING = {"pictures": draw_pictures, "finola": draw_finola, "energy": draw_energy, "features": write_features}
DRAWING |= {"hypergradient": draw_hypergradient, "layers": draw_layers, "relatives": draw_relatives}
BESIDE = ("layers", "relatives")  # these take all rows of the table, and give figures by row
