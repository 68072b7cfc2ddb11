"""How good answers are: the published scores of captions, questions, choices and boxes, each with its interval.

Everything here takes words and numbers and gives numbers; no module of it knows a model or a file.
"""
