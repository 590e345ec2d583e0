"""Simulators with scripted experts, and the collection of demonstrations from them.

`metaworld` needs the extra packages of `kairos-train[sim]` and a GL library; `push2d` needs nothing but numpy.
"""
