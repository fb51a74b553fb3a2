"""What is left under attack? Suites, checks, measures, records and their comparison.

plan            which attacks a suite runs, on which images, and their names in files
predictions     what logits decide in each view; images, samples and digests
suite           runs a suite and repeats attacks until they converge
suite_run       what one evaluation is given, and what its attacks have found so far
batches         one batch of one attack, made now or taken from an interrupted run
sanity          checks that say when the result of a suite must not be believed
measures        what single attacks measure: curves, transfer, smallest perturbations
schema          what a record and its predictions hold, as dataclasses
records         predictions of all runs → a record; reading and writing records
rows            records → the numbered rows of every table
comparisons     differences between records, with one correction for their number
"""
