"""The server: what runs on the GPU box, and learns from what devices let out.

A step walks forward: fleet → vault → trainer → gate → registry → fleet. Each child process can die and is restarted.
"""
