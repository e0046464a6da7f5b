"""Compare: the results of a run of many policies at many sizes -> curves, maps and tables on one page.

Data path: names of tasks -> `tasks`; the run is that of `headwise.eval`; its results, as JSON has them, -> `points` ->
`curves`, and `maps` of what every head keeps -> `page`. `published` makes a document of the records of several runs.
"""
