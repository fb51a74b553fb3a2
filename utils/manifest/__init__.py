"""One door for every data set: what images there are, of whom, in which class and part.

layout     what the path of an image says: split, class, subject
files      image files of a folder or zip, safely opened, and their bytes as 8-bit gray
table      the manifest: a CSV with one row an image
sources    folders, archives, tables of labels and parquet files → a manifest
volumes    NIfTI volumes and DICOM series → slices
command    the command line
"""
