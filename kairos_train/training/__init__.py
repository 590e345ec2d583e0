"""How a run goes: engine, optimiser, moving averages, and the state that a checkpoint holds."""
