"""What context ranks exchange: recurrent states, convolution halos, frames."""
