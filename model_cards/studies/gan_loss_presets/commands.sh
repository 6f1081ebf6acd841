# A command per cell, which trains it again with the settings of the study.

# DCGAN seed=0
hfgen train gan --dataset path/to/cat_faces_64 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --upsampling=nearest --generator_channels=32 --batch_size=16 --on_collapse=warn --max_train_steps=5000 --output_dir runs/DCGAN-seed=0

# LSGAN seed=0
hfgen train gan --dataset path/to/cat_faces_64 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --upsampling=nearest --generator_channels=32 --loss=least_squares --batch_size=16 --on_collapse=warn --max_train_steps=5000 --output_dir runs/LSGAN-seed=0

# SNGAN seed=0
hfgen train gan --dataset path/to/cat_faces_64 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --normalization=spectral --spectral_scale=2.0 --upsampling=nearest --generator_channels=32 --loss=hinge --batch_size=16 --on_collapse=warn --max_train_steps=5000 --output_dir runs/SNGAN-seed=0

# DCGAN seed=1
hfgen train gan --dataset path/to/cat_faces_64 --seed=1 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --upsampling=nearest --generator_channels=32 --batch_size=16 --on_collapse=warn --max_train_steps=5000 --output_dir runs/DCGAN-seed=1

# LSGAN seed=1
hfgen train gan --dataset path/to/cat_faces_64 --seed=1 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --upsampling=nearest --generator_channels=32 --loss=least_squares --batch_size=16 --on_collapse=warn --max_train_steps=5000 --output_dir runs/LSGAN-seed=1

# SNGAN seed=1
hfgen train gan --dataset path/to/cat_faces_64 --seed=1 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --normalization=spectral --spectral_scale=2.0 --upsampling=nearest --generator_channels=32 --loss=hinge --batch_size=16 --on_collapse=warn --max_train_steps=5000 --output_dir runs/SNGAN-seed=1
