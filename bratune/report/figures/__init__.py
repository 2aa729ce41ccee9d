"""Figures of a report, one file per question.

Every file has the plain numbers that it shows as named tuples, ``infos(records)`` that makes them,
``panels(infos)`` that draws them, and ``section(source)`` that puts both under the question. Tables list
the numbers and tests compare them; none of them knows a colour.
"""
