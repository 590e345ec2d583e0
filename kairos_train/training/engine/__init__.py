"""DeepSpeed behind one interface: parameters, optimizer, EMA and their state."""
