"""What a classifier looks at, and how far a map of it can be believed.

maps            one heat map an image: the Grad-CAM family and attention rollout
tokens, cells   what DINOv2's tokens need · where the cells of a coarse map lie in the image
similarity      how alike two maps are
stability       an attack that moves the map and keeps the prediction
faithfulness    does the prediction depend on the pixels that a map marks?
randomization   does a map depend on what the network learned?
anatomy         brain, ventricles, rim and background, and the share of a map in each
measures        all of these for one model, as its record keeps them
tables, conclusion, planted    the record as text for a notebook
figures         maps drawn over slices
"""
