"""What a kernel backend computes: windowed attention, the gated delta rule, rotary embedding."""
