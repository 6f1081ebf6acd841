# A command per cell, which trains it again with the settings of the study.

# 50 latents seed=0
hfgen train gan --dataset path/to/cat_faces_64 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --upsampling=nearest --latent_dim=50 --generator_channels=32 --batch_size=16 --on_collapse=warn --max_train_steps=5000 --output_dir runs/50-latents-seed=0

# 200 latents seed=0
hfgen train gan --dataset path/to/cat_faces_64 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --upsampling=nearest --latent_dim=200 --generator_channels=32 --batch_size=16 --on_collapse=warn --max_train_steps=5000 --output_dir runs/200-latents-seed=0

# batches of 32 seed=0
hfgen train gan --dataset path/to/cat_faces_64 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --upsampling=nearest --generator_channels=32 --batch_size=32 --on_collapse=warn --max_train_steps=2500 --output_dir runs/batches-of-32-seed=0

# batches of 64 seed=0
hfgen train gan --dataset path/to/cat_faces_64 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --upsampling=nearest --generator_channels=32 --on_collapse=warn --max_train_steps=1250 --output_dir runs/batches-of-64-seed=0

# batches of 8 seed=0
hfgen train gan --dataset path/to/cat_faces_64 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --upsampling=nearest --generator_channels=32 --batch_size=8 --on_collapse=warn --max_train_steps=10000 --output_dir runs/batches-of-8-seed=0

# the preset seed=0
hfgen train gan --dataset path/to/cat_faces_64 --sample_every=0 --report_to=none --sample_size=32 --horizontal_flip=True --network=sngan --discriminator_network=dcgan --upsampling=nearest --generator_channels=32 --batch_size=16 --on_collapse=warn --max_train_steps=5000 --output_dir runs/the-preset-seed=0
