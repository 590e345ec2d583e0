"""DeepSpeed behind one interface: parameters, optimizer, EMA, their state."""
