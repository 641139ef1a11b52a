"""Pure rules on arrays: Metropolis moves (`metropolis`: D, E, F) and annealing (`annealing`: G, H)."""
