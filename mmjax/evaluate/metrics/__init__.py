"""Published metrics of captions, answers to questions, choices and boxes, with confidence intervals.

The functions take text and numbers and return numbers. None of them depends on a model or a file.
"""
