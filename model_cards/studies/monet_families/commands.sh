# A command per cell, which trains it again with the settings of the study.

# DCGAN seed=0
hfgen train gan --dataset path/to/monet_paintings --sample_every=0 --report_to=none --horizontal_flip=True --batch_size=16 --max_train_steps=1875 --output_dir runs/DCGAN-seed=0

# dcgan_nearest seed=0
hfgen train gan --dataset path/to/monet_paintings --sample_every=0 --report_to=none --horizontal_flip=True --network=sngan --discriminator_network=dcgan --upsampling=nearest --generator_channels=32 --batch_size=16 --max_train_steps=1875 --output_dir runs/dcgan_nearest-seed=0

# WGAN-GP seed=0
hfgen train gan --dataset path/to/monet_paintings --sample_every=0 --report_to=none --horizontal_flip=True --network=sngan --discriminator_network=dcgan --normalization=none --upsampling=nearest --generator_channels=32 --loss=wasserstein --gradient_penalty_weight=10.0 --batch_size=16 --adam_beta1=0.0 --adam_beta2=0.9 --max_train_steps=1875 --output_dir runs/WGAN-GP-seed=0

# DDPM seed=0
hfgen train ddpm --dataset path/to/monet_paintings --sample_every=0 --report_to=none --horizontal_flip=True --formulation=edm --unet=compact --block_out_channels 64 128 128 --layers_per_block=1 --patch_size=2 --batch_size=16 --learning_rate=0.0004 --lr_warmup_steps=200 --ema_decay=0.9995 --num_inference_steps=10 --max_train_steps=1875 --output_dir runs/DDPM-seed=0

# VAE with a learned term seed=0
hfgen train vae --dataset path/to/monet_paintings --sample_every=0 --report_to=none --horizontal_flip=True --latent_dim=200 --block_out_channels 32 64 128 256 --layers_per_block=1 --upsampling=nearest --refine_channels=32 --feature_weight=10.0 --adversarial_weight=10.0 --learned_term_start=833 --batch_size=16 --learning_rate=0.0005 --lr_scheduler=cosine --density=auto --max_train_steps=1875 --output_dir runs/VAE-with-a-learned-term-seed=0
