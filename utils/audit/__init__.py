"""Is a split honest? The leak audit of any image folder, alone or against another.

measure    the evidence in one set: patients, split, synthetic images; its arrays and data card
figures    the evidence as figures, from its arrays alone
matching   patients that two sets share, found from pixels
ages       the shared patients by class and age, and scores on those of a range of ages
against    the audit of one set against another: what is shared, in words and as a file
page       the audit as a page of HTML, and the command line
"""
