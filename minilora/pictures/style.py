"""What all pictures share: colours that the colour-blind can tell apart, one for one thing."""

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"  # Okabe & Ito's palette
