"""What a backend computes: attention in windows, the delta rule, rotary embedding."""
