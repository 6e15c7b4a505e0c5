"""How the pictures of the documentation look: readable on white pages and on dark ones."""

INK = "#7d8590"  # of all text: it stands out on white and on black
FAVOR, EXACT, PEER, OTHER = "#3b82f6", "#e5761a", "#2e9e4f", "#a371f7"
LOOKS = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": f"cycler('color', {[FAVOR, EXACT, PEER, OTHER]})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.alpha": 0.2,
    "grid.color": INK,
    "legend.frameon": False,
    "savefig.transparent": True,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
