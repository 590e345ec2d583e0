"""What is optimised: flow matching on both streams, its noise schedules and the loss equation."""
