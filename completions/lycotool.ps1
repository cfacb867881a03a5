# Completion for lycotool, made by `lycotool --show-completion --shell powershell`. Do not edit.

Register-ArgumentCompleter -Native -CommandName lycotool -ScriptBlock {
  param($wordToComplete, $commandAst, $cursorPosition)

  $root = [ordered]@{
    '--version' = 'Show the version and exit'
    '--install-completion' = 'Install completion for the current shell'
    '--show-completion' = 'Print the completion script of the current shell'
    '--shell' = 'The shell that --install-completion and --show-completion are for'
    '--help' = 'Show help and exit'
  }
  $commands = [ordered]@{
    'train' = @{ Help = 'Train an adapter from a base model and captioned images'; Endings = @('.safetensors', '.safetensors.index.json', '.toml', '.json', '.jsonl', '.txt'); Options = [ordered]@{
      '--help' = @{ Help = 'Show help and exit'; Value = $null }
      '-o' = @{ Help = 'The adapter to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--output' = @{ Help = 'The adapter to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '-f' = @{ Help = 'Replace an existing output'; Value = $null }
      '--force' = @{ Help = 'Replace an existing output'; Value = $null }
      '-n' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--dry-run' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--config' = @{ Help = 'Options as TOML'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--kohya-config' = @{ Help = 'A training config of sd-scripts (TOML or JSON), with its meaning'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--print-config' = @{ Help = 'Print all options as TOML, and do nothing else'; Value = $null }
      '--strict' = @{ Help = 'Make warnings errors (exit code 5), before a step is made'; Value = $null }
      '--json' = @{ Help = 'Print one JSON object on stdout'; Value = $null }
      '-q' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--quiet' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--network-arg' = @{ Help = 'A network argument by the name sd-scripts or LyCORIS has for it'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--prediction' = @{ Help = 'What the model predicts'; Value = @{ Words = @('epsilon', 'v_prediction'); Endings = $null; Path = $false } }
      '--vae' = @{ Help = 'Another VAE'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--clip-skip' = @{ Help = 'Use the text encoder''s output of this many layers from the end'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--train-unet' = @{ Help = 'Train the UNet'; Value = $null }
      '--no-train-unet' = @{ Help = 'Train the UNet'; Value = $null }
      '--train-te' = @{ Help = 'Train the text encoders'; Value = $null }
      '--no-train-te' = @{ Help = 'Train the text encoders'; Value = $null }
      '--names' = @{ Help = 'Module names of an SDXL UNet in the file'; Value = @{ Words = @('kohya', 'diffusers'); Endings = $null; Path = $false } }
      '--algo' = @{ Help = 'Algorithm'; Value = @{ Words = @('lora', 'locon', 'loha', 'lokr', 'ia3', 'dylora', 'full', 'glora', 'diag-oft', 'boft'); Endings = $null; Path = $false } }
      '--preset' = @{ Help = 'Which layers'; Value = @{ Words = @('full', 'full-lin', 'attn-mlp', 'attn-only', 'unet-only', 'unet-transformer-only', 'unet-convblock-only', 'ia3'); Endings = @('.toml', '.json', '.jsonl', '.txt'); Path = $true } }
      '--dim' = @{ Help = 'Rank'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--alpha' = @{ Help = 'The change is scaled by alpha/dim'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--conv-dim' = @{ Help = 'Rank of convolutions with a kernel above 1x1'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--conv-alpha' = @{ Help = 'Alpha of convolutions with a kernel above 1x1'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--rs-lora' = @{ Help = "Scale by alpha/$([char]0x221A)dim instead"; Value = $null }
      '--no-rs-lora' = @{ Help = "Scale by alpha/$([char]0x221A)dim instead"; Value = $null }
      '--use-conv-cp' = @{ Help = 'Give convolutions with a kernel above 1x1 a CP (Tucker) core'; Value = $null }
      '--no-use-conv-cp' = @{ Help = 'Give convolutions with a kernel above 1x1 a CP (Tucker) core'; Value = $null }
      '--use-scalar' = @{ Help = 'Start from random factors below a trained scalar that is zero'; Value = $null }
      '--no-use-scalar' = @{ Help = 'Start from random factors below a trained scalar that is zero'; Value = $null }
      '--dora-wd' = @{ Help = 'DoRA'; Value = $null }
      '--no-dora-wd' = @{ Help = 'DoRA'; Value = $null }
      '--wd-on-output' = @{ Help = 'DoRA''s norms per output row'; Value = $null }
      '--no-wd-on-output' = @{ Help = 'DoRA''s norms per output row'; Value = $null }
      '--dropout' = @{ Help = 'Part of the change of the output that is dropped, element by element'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--rank-dropout' = @{ Help = 'Part of the ranks dropped in a step'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--rank-dropout-scale' = @{ Help = 'Divide what rank_dropout keeps by its share'; Value = $null }
      '--no-rank-dropout-scale' = @{ Help = 'Divide what rank_dropout keeps by its share'; Value = $null }
      '--module-dropout' = @{ Help = 'Chance of a layer to train nothing in a step'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--factor' = @{ Help = 'LoKr'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--decompose-both' = @{ Help = 'LoKr'; Value = $null }
      '--no-decompose-both' = @{ Help = 'LoKr'; Value = $null }
      '--full-matrix' = @{ Help = 'LoKr'; Value = $null }
      '--no-full-matrix' = @{ Help = 'LoKr'; Value = $null }
      '--unbalanced-factorization' = @{ Help = 'LoKr'; Value = $null }
      '--no-unbalanced-factorization' = @{ Help = 'LoKr'; Value = $null }
      '--block-size' = @{ Help = 'DyLoRA'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--constraint' = @{ Help = 'diag-oft, boft'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--rescaled' = @{ Help = 'diag-oft, boft'; Value = $null }
      '--no-rescaled' = @{ Help = 'diag-oft, boft'; Value = $null }
      '--train-on-input' = @{ Help = "(IA)$([char]0x00B3)"; Value = $null }
      '--no-train-on-input' = @{ Help = "(IA)$([char]0x00B3)"; Value = $null }
      '--train-norm' = @{ Help = 'Also train the norms of the chosen blocks'; Value = $null }
      '--no-train-norm' = @{ Help = 'Also train the norms of the chosen blocks'; Value = $null }
      '--loraplus-lr-ratio' = @{ Help = 'LoRA+'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--loraplus-unet-lr-ratio' = @{ Help = 'LoRA+ for the UNet'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--loraplus-text-encoder-lr-ratio' = @{ Help = 'LoRA+ for the text encoders'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--forward' = @{ Help = 'How a layer''s change is computed'; Value = @{ Words = @('auto', 'structured', 'fused'); Endings = $null; Path = $false } }
      '--network-weights' = @{ Help = 'Adapter file to start from'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--dim-from-weights' = @{ Help = 'Take algorithm, rank, alpha and layers from that file'; Value = $null }
      '--no-dim-from-weights' = @{ Help = 'Take algorithm, rank, alpha and layers from that file'; Value = $null }
      '--num-repeats' = @{ Help = 'Times each image is used per epoch'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--recursive' = @{ Help = 'Also read images in subfolders without a repeat number'; Value = $null }
      '--no-recursive' = @{ Help = 'Also read images in subfolders without a repeat number'; Value = $null }
      '--image-root' = @{ Help = 'What names in a metadata file are relative to'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--reg-data-dir' = @{ Help = 'Folder of regularisation images, or of N_class folders of them'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--prior-loss-weight' = @{ Help = 'Factor on the loss of regularisation images'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--is-reg' = @{ Help = 'The images are regularisation images'; Value = $null }
      '--no-is-reg' = @{ Help = 'The images are regularisation images'; Value = $null }
      '--validation-split' = @{ Help = 'Part of the images set aside for the validation loss, 0 to 1'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--validation-seed' = @{ Help = 'Which images are set aside'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--resolution' = @{ Help = 'Area of the training images'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--batch-size' = @{ Help = 'Batch size of each GPU'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--enable-bucket' = @{ Help = 'Keep aspect ratios'; Value = $null }
      '--no-enable-bucket' = @{ Help = 'Keep aspect ratios'; Value = $null }
      '--min-bucket-reso' = @{ Help = 'Shortest side of a bucket'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--max-bucket-reso' = @{ Help = 'Longest side of a bucket'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--bucket-reso-steps' = @{ Help = 'Bucket sides are multiples of this'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--bucket-no-upscale' = @{ Help = 'Never enlarge images'; Value = $null }
      '--no-bucket-no-upscale' = @{ Help = 'Never enlarge images'; Value = $null }
      '--caption-extension' = @{ Help = 'Suffix of caption files'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--class-tokens' = @{ Help = 'Caption of images that have none'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--allow-missing-captions' = @{ Help = 'Train images whose caption is missing or empty with an empty caption'; Value = $null }
      '--no-allow-missing-captions' = @{ Help = 'Train images whose caption is missing or empty with an empty caption'; Value = $null }
      '--caption-prefix' = @{ Help = 'Put before every caption, with a space'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--caption-suffix' = @{ Help = 'Put after every caption, with a space'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--caption-separator' = @{ Help = 'What separates the tags of a caption'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--shuffle-caption' = @{ Help = 'Shuffle the tags of a caption at each use'; Value = $null }
      '--no-shuffle-caption' = @{ Help = 'Shuffle the tags of a caption at each use'; Value = $null }
      '--keep-tokens' = @{ Help = 'Tags at the start that stay in place and are never dropped'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--keep-tokens-separator' = @{ Help = 'Instead'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--secondary-separator' = @{ Help = 'Text such as ;;; between tags that stay together'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--enable-wildcard' = @{ Help = 'Draw one of {a|b|c}, and one line of a caption of several'; Value = $null }
      '--no-enable-wildcard' = @{ Help = 'Draw one of {a|b|c}, and one line of a caption of several'; Value = $null }
      '--caption-dropout-rate' = @{ Help = 'Chance that a caption is left out, 0 to 1'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--caption-dropout-every-n-epochs' = @{ Help = 'Leave out all captions in every n-th epoch'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--caption-tag-dropout-rate' = @{ Help = 'Chance that a tag is left out, 0 to 1'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--token-warmup-min' = @{ Help = 'Tags used at the first step of the tag warm-up'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--token-warmup-step' = @{ Help = 'When all tags are used'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--max-token-length' = @{ Help = 'How much of a caption is read'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--flip-aug' = @{ Help = 'Mirror half of the images, drawn at each use'; Value = $null }
      '--no-flip-aug' = @{ Help = 'Mirror half of the images, drawn at each use'; Value = $null }
      '--random-crop' = @{ Help = 'Crop at a random place at each use'; Value = $null }
      '--no-random-crop' = @{ Help = 'Crop at a random place at each use'; Value = $null }
      '--resize-interpolation' = @{ Help = 'How images are resized'; Value = @{ Words = @('lanczos', 'bicubic', 'bilinear', 'box', 'area', 'nearest'); Endings = $null; Path = $false } }
      '--cache-latents' = @{ Help = 'Where encoded images are kept'; Value = @{ Words = @('memory', 'disk', 'none'); Endings = $null; Path = $false } }
      '--cache-text' = @{ Help = 'Where encoded captions are kept while no text encoder is trained'; Value = @{ Words = @('memory', 'disk', 'none'); Endings = $null; Path = $false } }
      '--cache-dir' = @{ Help = 'Folder of caches kept on disk'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--steps' = @{ Help = 'Optimizer steps'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--epochs' = @{ Help = 'Passes over the data, instead of --steps'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--gradient-accumulation-steps' = @{ Help = 'Batches per optimizer step'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--seed' = @{ Help = 'Every random draw of the run follows from it'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--optimizer' = @{ Help = "adamw, adafactor, lion, prodigy, sgd, sgdnesterov, adamw8bit, $([char]0x2026)"; Value = @{ Words = @('adamw', 'lion', 'prodigy', 'adafactor', 'sgd', 'sgdnesterov', 'adamw8bit', 'pagedadamw8bit', 'pagedadamw', 'lion8bit', 'pagedlion8bit', 'sgdnesterov8bit'); Endings = $null; Path = $false } }
      '--optimizer-arg' = @{ Help = 'An argument of the optimizer'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--lr' = @{ Help = 'Learning rate'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--unet-lr' = @{ Help = 'Learning rate of the UNet'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--te-lr' = @{ Help = "Learning rate of the text encoders, or, given twice, of SDXL's first $([char]0x2026)"; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--max-grad-norm' = @{ Help = 'Gradients are scaled down to this norm'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--fused-backward' = @{ Help = "Move each parameter as soon as its gradient is complete, and free the $([char]0x2026)"; Value = $null }
      '--no-fused-backward' = @{ Help = "Move each parameter as soon as its gradient is complete, and free the $([char]0x2026)"; Value = $null }
      '--scale-weight-norms' = @{ Help = 'After each step, scale down weight changes whose norm is larger'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--lr-scheduler' = @{ Help = 'Shape of the schedule'; Value = @{ Words = @('constant', 'constant_with_warmup', 'linear', 'cosine', 'cosine_with_restarts', 'polynomial', 'cosine_with_min_lr', 'warmup_stable_decay', 'inverse_sqrt', 'piecewise_constant'); Endings = $null; Path = $false } }
      '--lr-warmup-steps' = @{ Help = 'The learning rate rises from 0 in so many steps'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--lr-decay-steps' = @{ Help = 'It falls in the last so many steps (warmup_stable_decay)'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--lr-scheduler-num-cycles' = @{ Help = 'Cycles of a cosine'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--lr-scheduler-power' = @{ Help = 'Exponent of polynomial'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--lr-scheduler-min-lr-ratio' = @{ Help = 'Smallest factor of cosine_with_min_lr and warmup_stable_decay'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--lr-scheduler-timescale' = @{ Help = 'Time scale of inverse_sqrt'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--lr-scheduler-rules' = @{ Help = 'Factors of piecewise_constant'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--noise-offset' = @{ Help = 'Strength of a random shift of each channel'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--noise-offset-random-strength' = @{ Help = 'Draw that strength for each image, up to the given one'; Value = $null }
      '--no-noise-offset-random-strength' = @{ Help = 'Draw that strength for each image, up to the given one'; Value = $null }
      '--adaptive-noise-scale' = @{ Help = 'Add this times the mean latent of a channel to its noise offset'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--multires-noise-iterations' = @{ Help = 'Levels of multi-resolution noise'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--multires-noise-discount' = @{ Help = 'Factor on each coarser level'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--ip-noise-gamma' = @{ Help = 'Strength of noise added to the input alone (input perturbation)'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--ip-noise-gamma-random-strength' = @{ Help = 'Draw that strength for each image, up to the given one'; Value = $null }
      '--no-ip-noise-gamma-random-strength' = @{ Help = 'Draw that strength for each image, up to the given one'; Value = $null }
      '--zero-terminal-snr' = @{ Help = 'Rescale the noise schedule to end in pure noise'; Value = $null }
      '--no-zero-terminal-snr' = @{ Help = 'Rescale the noise schedule to end in pure noise'; Value = $null }
      '--min-timestep' = @{ Help = 'First time step that is drawn'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--max-timestep' = @{ Help = 'Time step before which drawing ends'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--loss-type' = @{ Help = 'Loss of each element'; Value = @{ Words = @('l2', 'l1', 'huber', 'smooth_l1'); Endings = $null; Path = $false } }
      '--huber-schedule' = @{ Help = 'How the threshold of huber and smooth_l1 follows the noise'; Value = @{ Words = @('snr', 'exponential', 'constant'); Endings = $null; Path = $false } }
      '--huber-c' = @{ Help = 'That threshold'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--huber-scale' = @{ Help = 'Factor on it, for the schedules constant and exponential'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--min-snr-gamma' = @{ Help = "Min-SNR weighting with this $([char]0x03B3)"; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--debiased-estimation-loss' = @{ Help = 'Debiased estimation weighting'; Value = $null }
      '--no-debiased-estimation-loss' = @{ Help = 'Debiased estimation weighting'; Value = $null }
      '--scale-v-pred-loss-like-noise-pred' = @{ Help = 'Weigh a v-prediction loss as that of the noise'; Value = $null }
      '--no-scale-v-pred-loss-like-noise-pred' = @{ Help = 'Weigh a v-prediction loss as that of the noise'; Value = $null }
      '--v-pred-like-loss' = @{ Help = 'Add the loss as v-prediction weighs it, times this'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--device' = @{ Help = 'Where to compute'; Value = @{ Words = @('auto', 'cpu', 'cuda', 'mps'); Endings = $null; Path = $false } }
      '--gpus' = @{ Help = 'Train on so many GPUs, a process and --batch-size images on each'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--precision' = @{ Help = 'Of the base model'; Value = @{ Words = @('auto', 'bf16', 'fp16', 'fp32'); Endings = $null; Path = $false } }
      '--vae-precision' = @{ Help = 'Of the VAE'; Value = @{ Words = @('fp32', 'bf16', 'fp16'); Endings = $null; Path = $false } }
      '--base-dtype' = @{ Help = 'Hold the frozen weights of layers in 8 bits'; Value = @{ Words = @('fp8', 'int8'); Endings = $null; Path = $false } }
      '--gradient-checkpointing' = @{ Help = 'Compute activations again for the gradient'; Value = $null }
      '--no-gradient-checkpointing' = @{ Help = 'Compute activations again for the gradient'; Value = $null }
      '--shard-optimizer' = @{ Help = "Shard the optimizer over the processes of --gpus, each of which keeps $([char]0x2026)"; Value = $null }
      '--no-shard-optimizer' = @{ Help = "Shard the optimizer over the processes of --gpus, each of which keeps $([char]0x2026)"; Value = $null }
      '--cuda-graphs' = @{ Help = 'Record a step on a GPU once for each shape of a batch, and replay it'; Value = $null }
      '--no-cuda-graphs' = @{ Help = 'Record a step on a GPU once for each shape of a batch, and replay it'; Value = $null }
      '--triton' = @{ Help = "Own kernels for norms and gated activations on an NVIDIA GPU in half $([char]0x2026)"; Value = $null }
      '--no-triton' = @{ Help = "Own kernels for norms and gated activations on an NVIDIA GPU in half $([char]0x2026)"; Value = $null }
      '--save-every-n-steps' = @{ Help = 'Also save the adapter every so many steps'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--save-every-n-epochs' = @{ Help = 'Also save it every so many epochs'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--keep-saves' = @{ Help = 'Keep so many of these, the latest'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--save-dtype' = @{ Help = 'dtype of the adapter''s file'; Value = @{ Words = @('fp32', 'bf16', 'fp16'); Endings = $null; Path = $false } }
      '--format' = @{ Help = 'Format of the file'; Value = @{ Words = @('networks.lora', 'lycoris.kohya', 'locon.locon_kohya', 'lycoris', 'diffusers', 'diffusers-legacy', 'peft', 'comfyui', 'onetrainer', 'ai-toolkit', 'bfl', 'hcp', 'kohya-oft'); Endings = $null; Path = $false } }
      '--split-dylora' = @{ Help = 'Also save a DyLoRA as one LoRA for each multiple of its block size'; Value = $null }
      '--no-split-dylora' = @{ Help = 'Also save a DyLoRA as one LoRA for each multiple of its block size'; Value = $null }
      '--save-state' = @{ Help = "Keep what a resume needs beside the output, at every save and $([char]0x2026)"; Value = $null }
      '--no-save-state' = @{ Help = "Keep what a resume needs beside the output, at every save and $([char]0x2026)"; Value = $null }
      '--save-state-on-train-end' = @{ Help = 'Keep it when the run is complete, too'; Value = $null }
      '--no-save-state-on-train-end' = @{ Help = 'Keep it when the run is complete, too'; Value = $null }
      '--resume' = @{ Help = 'Continue from this folder'; Value = @{ Words = @(); Endings = @(); Path = $true } }
      '--fresh' = @{ Help = 'Start anew, whatever OUTPUT.state holds'; Value = $null }
      '--no-fresh' = @{ Help = 'Start anew, whatever OUTPUT.state holds'; Value = $null }
      '--metadata' = @{ Help = 'Write the training''s numbers'; Value = $null }
      '--no-metadata' = @{ Help = 'Write the training''s numbers'; Value = $null }
      '--training-comment' = @{ Help = 'A comment (ss_training_comment)'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--metadata-title' = @{ Help = 'Title'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--metadata-author' = @{ Help = 'Author'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--metadata-description' = @{ Help = 'Description'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--metadata-license' = @{ Help = 'Licence'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--metadata-tags' = @{ Help = 'Tags, with commas'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--log-file' = @{ Help = 'Write a JSON object per line'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--tensorboard' = @{ Help = 'Write TensorBoard''s files to this folder'; Value = @{ Words = @(); Endings = @(); Path = $true } }
      '--log-every' = @{ Help = 'Fetch losses from the device every so many steps'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--validate-every-n-steps' = @{ Help = 'Validate every so many steps'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--validate-every-n-epochs' = @{ Help = 'Validate every so many epochs'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--max-validation-steps' = @{ Help = 'Use so many batches at most'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--sample-prompts' = @{ Help = 'Prompts, one per line, with --n --w --h --d --s --l --ss'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--sample-every-n-steps' = @{ Help = 'Make images every so many steps'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--sample-every-n-epochs' = @{ Help = 'Make images every so many epochs'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--sample-at-first' = @{ Help = 'Make images before the first step, too'; Value = $null }
      '--no-sample-at-first' = @{ Help = 'Make images before the first step, too'; Value = $null }
      '--sample-sampler' = @{ Help = 'Sampler of prompts that name none'; Value = @{ Words = @('ddim', 'ddpm', 'pndm', 'lms', 'euler', 'euler_a', 'heun', 'dpm_2', 'dpm_2_a', 'dpmsolver', 'dpmsolver++', 'dpmsingle'); Endings = $null; Path = $false } }
    } }
    'merge' = @{ Help = 'Merge adapters into a checkpoint, or adapters into one adapter'; Endings = @('.safetensors', '.safetensors.index.json'); Options = [ordered]@{
      '--help' = @{ Help = 'Show help and exit'; Value = $null }
      '-o' = @{ Help = 'Where to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--output' = @{ Help = 'Where to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '-f' = @{ Help = 'Replace an existing output'; Value = $null }
      '--force' = @{ Help = 'Replace an existing output'; Value = $null }
      '--dtype' = @{ Help = 'Saved dtype'; Value = @{ Words = @('keep', 'fp32', 'fp16', 'bf16', 'fp8_e4m3fn', 'fp8_e5m2'); Endings = $null; Path = $false } }
      '--metadata' = @{ Help = 'Whose metadata an adapter merge keeps'; Value = @{ Words = @('first', 'union', 'none'); Endings = $null; Path = $false } }
      '--title' = @{ Help = 'modelspec.title of a checkpoint'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--shard-size' = @{ Help = 'Write a checkpoint as files of at most this size and an index'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--verify' = @{ Help = 'Read the output before it gets its name and compare it with float64'; Value = $null }
      '--strict' = @{ Help = 'Make warnings errors (exit code 5), before anything is written'; Value = $null }
      '-n' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--dry-run' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--json' = @{ Help = 'Print one JSON object on stdout'; Value = $null }
      '-q' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--quiet' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--method' = @{ Help = "How the changes w$([char]0x00B7)$([char]0x0394)W become one"; Value = @{ Words = @('exact', 'svd', 'ties', 'dare', 'dare-ties', 'magnitude-prune', 'della', 'breadcrumbs', 'slerp', 'nuslerp'); Endings = $null; Path = $false } }
      '--density' = @{ Help = 'Share of each layer''s elements to keep'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--gamma' = @{ Help = 'breadcrumbs'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--epsilon' = @{ Help = 'della'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--lambda' = @{ Help = 'Factor of the combined change'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--normalize' = @{ Help = "Divide by nothing, by how many adapters agree, or by the sum of their $([char]0x2026)"; Value = @{ Words = @('none', 'count', 'weight'); Endings = $null; Path = $false } }
      '--consensus' = @{ Help = 'Elected sign'; Value = @{ Words = @('total', 'frequency'); Endings = $null; Path = $false } }
      '--t' = @{ Help = 'slerp'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--along' = @{ Help = 'nuslerp'; Value = @{ Words = @('whole', 'rows', 'columns'); Endings = $null; Path = $false } }
      '--seed' = @{ Help = 'For dare, dare-ties and della'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--compat' = @{ Help = 'kohya'; Value = @{ Words = @('none', 'kohya'); Endings = $null; Path = $false } }
      '--concat' = @{ Help = 'With --compat kohya, its --concat'; Value = $null }
      '--rank' = @{ Help = 'Truncate the merged adapter to LoRA factors of this rank'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--conv-rank' = @{ Help = 'Rank of kernels larger than 1'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--size' = @{ Help = 'Largest size of the file, 32MB (decimal) or 30MiB (binary)'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--error' = @{ Help = 'Relative error of the whole file'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--te' = @{ Help = 'Factor for text encoders'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--unet' = @{ Help = 'Factor for the UNet or transformer'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--lbw' = @{ Help = 'Factors by block'; Value = @{ Words = @('NONE', 'ALL', 'INS', 'IND', 'INALL', 'MIDD', 'OUTD', 'OUTS', 'OUTALL', 'ALL0.5'); Endings = @('.toml', '.json', '.jsonl', '.txt'); Path = $true } }
      '--lbw-rule' = @{ Help = 'Factor for layers of some blocks, such as IN05-OUT05:attn:0.5'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--recipe' = @{ Help = 'Read inputs and options from a TOML file'; Value = @{ Words = @(); Endings = @('.toml', '.json', '.jsonl', '.txt'); Path = $true } }
      '--replay' = @{ Help = "Merge again what OUTPUT's metadata say it was merged from, and compare $([char]0x2026)"; Value = @{ Words = @(); Endings = @('.safetensors', '.safetensors.index.json'); Path = $true } }
      '--inputs-dir' = @{ Help = 'Where --replay looks for the inputs first'; Value = @{ Words = @(); Endings = @(); Path = $true } }
      '--rebuild' = @{ Help = 'Merge what the rules refuse, by rebuilding the weight change'; Value = $null }
      '--base' = @{ Help = 'Checkpoint for algorithms whose change depends on it'; Value = @{ Words = @(); Endings = @('.safetensors', '.safetensors.index.json'); Path = $true } }
      '--vae' = @{ Help = "Replace the checkpoint's VAE by this file's or folder's, in LDM or $([char]0x2026)"; Value = @{ Words = @(); Endings = @('.safetensors', '.safetensors.index.json'); Path = $true } }
      '--device' = @{ Help = 'Where to compute'; Value = @{ Words = @('auto', 'cpu', 'cuda', 'mps'); Endings = $null; Path = $false } }
      '--allow-pickle' = @{ Help = 'Read .pt, .ckpt and .bin files too (plain tensors only)'; Value = $null }
      '--alpha-zero' = @{ Help = 'What a stored alpha of 0 means'; Value = @{ Words = @('zero', 'rank'); Endings = $null; Path = $false } }
      '--dora-strength' = @{ Help = 'How DoRA follows a strength other than 1'; Value = @{ Words = @('linear', 'lycoris', 'peft'); Endings = $null; Path = $false } }
      '--dylora-block-size' = @{ Help = 'Block size, in ranks, that a LyCORIS DyLoRA was trained with'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--legacy-loha-cp' = @{ Help = 'LoHa with cores trained before LyCORIS 2.0.0'; Value = $null }
      '--glora-old-scale' = @{ Help = 'Scale of old-layout GLoRA'; Value = @{ Words = @('once', 'twice'); Endings = $null; Path = $false } }
    } }
    'bake' = @{ Help = 'Fold adapters of any algorithm into a checkpoint'; Endings = @('.safetensors', '.safetensors.index.json'); Options = [ordered]@{
      '--help' = @{ Help = 'Show help and exit'; Value = $null }
      '-o' = @{ Help = 'Where to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--output' = @{ Help = 'Where to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '-f' = @{ Help = 'Replace an existing output'; Value = $null }
      '--force' = @{ Help = 'Replace an existing output'; Value = $null }
      '--dtype' = @{ Help = 'Saved dtype'; Value = @{ Words = @('keep', 'fp32', 'fp16', 'bf16', 'fp8_e4m3fn', 'fp8_e5m2'); Endings = $null; Path = $false } }
      '--shard-size' = @{ Help = 'Write a checkpoint as files of at most this size and an index'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--vae' = @{ Help = "Replace the checkpoint's VAE by this file's or folder's, in LDM or $([char]0x2026)"; Value = @{ Words = @(); Endings = @('.safetensors', '.safetensors.index.json'); Path = $true } }
      '--verify' = @{ Help = 'Read the output before it gets its name and compare it with float64'; Value = $null }
      '--unbake' = @{ Help = 'Take the adapters out again, and say how exactly'; Value = $null }
      '--te' = @{ Help = 'Factor for text encoders'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--unet' = @{ Help = 'Factor for the UNet or transformer'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--lbw' = @{ Help = 'Factors by block'; Value = @{ Words = @('NONE', 'ALL', 'INS', 'IND', 'INALL', 'MIDD', 'OUTD', 'OUTS', 'OUTALL', 'ALL0.5'); Endings = @('.toml', '.json', '.jsonl', '.txt'); Path = $true } }
      '--lbw-rule' = @{ Help = 'Factor for layers of some blocks, such as IN05-OUT05:attn:0.5'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--device' = @{ Help = 'Where to compute'; Value = @{ Words = @('auto', 'cpu', 'cuda', 'mps'); Endings = $null; Path = $false } }
      '--allow-pickle' = @{ Help = 'Read .pt, .ckpt and .bin files too (plain tensors only)'; Value = $null }
      '--strict' = @{ Help = 'Make warnings errors (exit code 5), before anything is written'; Value = $null }
      '-n' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--dry-run' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--json' = @{ Help = 'Print one JSON object on stdout'; Value = $null }
      '-q' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--quiet' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--alpha-zero' = @{ Help = 'What a stored alpha of 0 means'; Value = @{ Words = @('zero', 'rank'); Endings = $null; Path = $false } }
      '--dora-strength' = @{ Help = 'How DoRA follows a strength other than 1'; Value = @{ Words = @('linear', 'lycoris', 'peft'); Endings = $null; Path = $false } }
      '--dylora-block-size' = @{ Help = 'Block size, in ranks, that a LyCORIS DyLoRA was trained with'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--legacy-loha-cp' = @{ Help = 'LoHa with cores trained before LyCORIS 2.0.0'; Value = $null }
      '--glora-old-scale' = @{ Help = 'Scale of old-layout GLoRA'; Value = @{ Words = @('once', 'twice'); Endings = $null; Path = $false } }
    } }
    'resize' = @{ Help = 'Shrink an adapter''s ranks, losing as little as that rank allows'; Endings = @('.safetensors', '.safetensors.index.json'); Options = [ordered]@{
      '--help' = @{ Help = 'Show help and exit'; Value = $null }
      '--rank' = @{ Help = 'New rank'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--conv-rank' = @{ Help = 'Rank of kernels larger than 1'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--method' = @{ Help = 'How each module''s rank is chosen from its singular values'; Value = @{ Words = @('fixed', 'threshold', 'sv_ratio', 'sv_cumulative', 'sv_fro', 'sv_knee', 'sv_cumulative_knee', 'sv_rel_decrease'); Endings = $null; Path = $false } }
      '--param' = @{ Help = 'The method''s number'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--size' = @{ Help = 'Largest size of the file, 32MB (decimal) or 30MiB (binary)'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--error' = @{ Help = 'Relative error of the whole file'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--to' = @{ Help = 'Convert LoHa and LoKr exactly to LoRA first'; Value = @{ Words = @('keep', 'lora'); Endings = $null; Path = $false } }
      '--keep-refused' = @{ Help = 'Carry modules that the rules refuse over unchanged'; Value = $null }
      '--split' = @{ Help = "Slice a DyLoRA into one file per multiple of --unit, in the folder -o, $([char]0x2026)"; Value = $null }
      '--unit' = @{ Help = 'The DyLoRA''s unit (block size), in ranks'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--compat' = @{ Help = 'kohya'; Value = @{ Words = @('none', 'kohya'); Endings = $null; Path = $false } }
      '-o' = @{ Help = 'Where to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--output' = @{ Help = 'Where to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '-f' = @{ Help = 'Replace an existing output'; Value = $null }
      '--force' = @{ Help = 'Replace an existing output'; Value = $null }
      '--dtype' = @{ Help = 'Saved dtype'; Value = @{ Words = @('keep', 'fp32', 'fp16', 'bf16', 'fp8_e4m3fn', 'fp8_e5m2'); Endings = $null; Path = $false } }
      '--device' = @{ Help = 'Where to compute'; Value = @{ Words = @('auto', 'cpu', 'cuda', 'mps'); Endings = $null; Path = $false } }
      '--allow-pickle' = @{ Help = 'Read .pt, .ckpt and .bin files too (plain tensors only)'; Value = $null }
      '--strict' = @{ Help = 'Make warnings errors (exit code 5), before anything is written'; Value = $null }
      '-n' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--dry-run' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--json' = @{ Help = 'Print one JSON object on stdout'; Value = $null }
      '-q' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--quiet' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--modules' = @{ Help = 'Report every module'; Value = $null }
      '--alpha-zero' = @{ Help = 'What a stored alpha of 0 means'; Value = @{ Words = @('zero', 'rank'); Endings = $null; Path = $false } }
      '--dylora-block-size' = @{ Help = 'Block size, in ranks, that a LyCORIS DyLoRA was trained with'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--legacy-loha-cp' = @{ Help = 'LoHa with cores trained before LyCORIS 2.0.0'; Value = $null }
    } }
    'extract' = @{ Help = 'Write the difference of two checkpoints as an adapter'; Endings = @('.safetensors', '.safetensors.index.json'); Options = [ordered]@{
      '--help' = @{ Help = 'Show help and exit'; Value = $null }
      '--algo' = @{ Help = 'What the difference becomes'; Value = @{ Words = @('lora', 'lokr', 'full', 'dora', 'ia3'); Endings = $null; Path = $false } }
      '--mode' = @{ Help = 'How each layer''s rank is chosen from its singular values'; Value = @{ Words = @('fixed', 'threshold', 'ratio', 'quantile', 'fro', 'full', 'size', 'error'); Endings = $null; Path = $false } }
      '--rank' = @{ Help = 'Rank of mode fixed, cap of the others'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--conv-rank' = @{ Help = 'Rank of kernels larger than 1'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--param' = @{ Help = 'The mode''s number'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--conv-param' = @{ Help = 'The mode''s number for kernels larger than 1'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--size' = @{ Help = 'Largest file of mode size, 64MB (decimal) or 60MiB (binary)'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--error' = @{ Help = 'Relative error of the whole file, of mode error'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--use-conv-cp' = @{ Help = 'Convolutions with a CP (Tucker) core'; Value = $null }
      '--sparse-bias' = @{ Help = 'Also keep the largest entries that the factors leave'; Value = $null }
      '--sparsity' = @{ Help = 'Share of entries the sparse part leaves out'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--factor' = @{ Help = 'LoKr''s factor'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--dora-axis' = @{ Help = 'Which axis DoRA keeps the norms of'; Value = @{ Words = @('out', 'in'); Endings = $null; Path = $false } }
      '--include' = @{ Help = 'Only these layers, by adapter or checkpoint name'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--exclude' = @{ Help = 'Not these layers'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--min-diff' = @{ Help = 'Skip layers whose largest difference of an element is no more than this'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--clamp-quantile' = @{ Help = "Cut the factors at this quantile of their sizes, as older tools do at $([char]0x2026)"; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--seed' = @{ Help = 'For the random start of the approximation'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '-o' = @{ Help = 'Where to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--output' = @{ Help = 'Where to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '-f' = @{ Help = 'Replace an existing output'; Value = $null }
      '--force' = @{ Help = 'Replace an existing output'; Value = $null }
      '--dtype' = @{ Help = 'Saved dtype'; Value = @{ Words = @('keep', 'fp32', 'fp16', 'bf16', 'fp8_e4m3fn', 'fp8_e5m2'); Endings = $null; Path = $false } }
      '--device' = @{ Help = 'Where to compute'; Value = @{ Words = @('auto', 'cpu', 'cuda', 'mps'); Endings = $null; Path = $false } }
      '--allow-pickle' = @{ Help = 'Read .pt, .ckpt and .bin files too (plain tensors only)'; Value = $null }
      '--strict' = @{ Help = 'Make warnings errors (exit code 5), before anything is written'; Value = $null }
      '-n' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--dry-run' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--json' = @{ Help = 'Print one JSON object on stdout'; Value = $null }
      '-q' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--quiet' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--modules' = @{ Help = 'Report every module'; Value = $null }
    } }
    'inspect' = @{ Help = 'Show what a file is and what can be done with it'; Endings = @('.safetensors', '.safetensors.index.json'); Options = [ordered]@{
      '--help' = @{ Help = 'Show help and exit'; Value = $null }
      '--modules' = @{ Help = 'Show every module'; Value = $null }
      '--blocks' = @{ Help = 'Count modules by block of the model'; Value = $null }
      '--metadata' = @{ Help = 'Show all metadata, decoded'; Value = $null }
      '--tags' = @{ Help = 'Count the tags of the training captions, all data sets together'; Value = $null }
      '--hashes' = @{ Help = 'SHA-256, AutoV2 and AutoV3'; Value = $null }
      '--top' = @{ Help = 'Lines of long tables (tags, strongest modules, least alike layers)'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--stats' = @{ Help = "Strength of each module's change $([char]0x0394)W, its ranks by several measures, $([char]0x2026)"; Value = $null }
      '--compare' = @{ Help = 'Put another adapter beside this one'; Value = @{ Words = @(); Endings = @('.safetensors', '.safetensors.index.json'); Path = $true } }
      '--plot' = @{ Help = 'Draw what --stats or --compare measures'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--base' = @{ Help = 'Checkpoint to measure against'; Value = @{ Words = @(); Endings = @('.safetensors', '.safetensors.index.json'); Path = $true } }
      '--device' = @{ Help = 'Where to measure, in float64'; Value = @{ Words = @('auto', 'cpu', 'cuda'); Endings = $null; Path = $false } }
      '--check' = @{ Help = 'Look for faults and oddities, reading everything'; Value = $null }
      '--headers-only' = @{ Help = 'With --check'; Value = $null }
      '--fail-on' = @{ Help = 'The least finding that ends with exit code 10'; Value = @{ Words = @('error', 'warning', 'info'); Endings = $null; Path = $false } }
      '--sort' = @{ Help = 'Order of several files'; Value = @{ Words = @('name', 'size', 'rank', 'modules', 'algorithm', 'arch', 'strength', 'findings'); Endings = $null; Path = $false } }
      '--reverse' = @{ Help = 'Largest or last first'; Value = $null }
      '--set' = @{ Help = 'Set a metadata key'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--unset' = @{ Help = 'Take a metadata key out, or all that fit a pattern such as ss_*'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--strip-training-data' = @{ Help = 'Take out captions, folders, settings and times of training'; Value = $null }
      '-o' = @{ Help = 'Where to write the edited file'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--output' = @{ Help = 'Where to write the edited file'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--in-place' = @{ Help = 'Replace the file itself, whole or not at all'; Value = $null }
      '-f' = @{ Help = 'Replace an existing output'; Value = $null }
      '--force' = @{ Help = 'Replace an existing output'; Value = $null }
      '-n' = @{ Help = 'Report the edit, write nothing'; Value = $null }
      '--dry-run' = @{ Help = 'Report the edit, write nothing'; Value = $null }
      '--allow-pickle' = @{ Help = 'Read .pt, .ckpt and .bin files too (plain tensors only)'; Value = $null }
      '--strict' = @{ Help = 'Make warnings errors (exit code 5), before anything is written'; Value = $null }
      '--json' = @{ Help = 'Print one JSON object on stdout'; Value = $null }
      '-q' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--quiet' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--alpha-zero' = @{ Help = 'What a stored alpha of 0 means'; Value = @{ Words = @('zero', 'rank'); Endings = $null; Path = $false } }
      '--dora-strength' = @{ Help = 'How DoRA follows a strength other than 1'; Value = @{ Words = @('linear', 'lycoris', 'peft'); Endings = $null; Path = $false } }
      '--dylora-block-size' = @{ Help = 'Block size, in ranks, that a LyCORIS DyLoRA was trained with'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--legacy-loha-cp' = @{ Help = 'LoHa with cores trained before LyCORIS 2.0.0'; Value = $null }
      '--glora-old-scale' = @{ Help = 'Scale of old-layout GLoRA'; Value = @{ Words = @('once', 'twice'); Endings = $null; Path = $false } }
    } }
    'convert' = @{ Help = 'Write an adapter in another program''s format, and verify it'; Endings = @('.safetensors', '.safetensors.index.json'); Options = [ordered]@{
      '--help' = @{ Help = 'Show help and exit'; Value = $null }
      '--to' = @{ Help = 'Whose format to write'; Value = @{ Words = @('networks.lora', 'lycoris.kohya', 'locon.locon_kohya', 'lycoris', 'diffusers', 'diffusers-legacy', 'peft', 'comfyui', 'onetrainer', 'ai-toolkit', 'bfl', 'hcp', 'kohya-oft'); Endings = $null; Path = $false } }
      '--from' = @{ Help = 'Whose format the file is in, by the same names'; Value = @{ Words = @('networks.lora', 'lycoris.kohya', 'locon.locon_kohya', 'lycoris', 'diffusers', 'diffusers-legacy', 'peft', 'comfyui', 'onetrainer', 'ai-toolkit', 'bfl', 'hcp', 'kohya-oft'); Endings = $null; Path = $false } }
      '--arch' = @{ Help = 'The model it is for'; Value = @{ Words = @('sdxl', 'sd1', 'sd2', 'chroma', 'flux2', 'flux1', 'hunyuan-video-1.5', 'hunyuan-image', 'hunyuan-video', 'sd3', 'qwen-image', 'z-image', 'lumina2', 'anima', 'wan'); Endings = $null; Path = $false } }
      '--drop' = @{ Help = 'Leave out what the format cannot hold'; Value = $null }
      '--algo' = @{ Help = 'Also change the algorithm'; Value = @{ Words = @('keep', 'lora', 'full'); Endings = $null; Path = $false } }
      '--rank' = @{ Help = 'Rank of what has no exact LoRA form'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--error' = @{ Help = 'Or its relative error, by module'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--base' = @{ Help = 'Checkpoint for algorithms whose change depends on it'; Value = @{ Words = @(); Endings = @('.safetensors', '.safetensors.index.json'); Path = $true } }
      '--verify' = @{ Help = 'Compare the change of every module with the written file''s'; Value = $null }
      '--no-verify' = @{ Help = 'Compare the change of every module with the written file''s'; Value = $null }
      '-o' = @{ Help = 'Where to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '--output' = @{ Help = 'Where to write'; Value = @{ Words = @(); Endings = $null; Path = $true } }
      '-f' = @{ Help = 'Replace an existing output'; Value = $null }
      '--force' = @{ Help = 'Replace an existing output'; Value = $null }
      '--dtype' = @{ Help = 'Saved dtype'; Value = @{ Words = @('keep', 'fp32', 'fp16', 'bf16', 'fp8_e4m3fn', 'fp8_e5m2'); Endings = $null; Path = $false } }
      '--allow-pickle' = @{ Help = 'Read .pt, .ckpt and .bin files too (plain tensors only)'; Value = $null }
      '--strict' = @{ Help = 'Make warnings errors (exit code 5), before anything is written'; Value = $null }
      '-n' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--dry-run' = @{ Help = 'Plan and report, write nothing'; Value = $null }
      '--json' = @{ Help = 'Print one JSON object on stdout'; Value = $null }
      '-q' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--quiet' = @{ Help = 'Nothing on stderr but errors'; Value = $null }
      '--modules' = @{ Help = 'Report every module'; Value = $null }
      '--alpha-zero' = @{ Help = 'What a stored alpha of 0 means'; Value = @{ Words = @('zero', 'rank'); Endings = $null; Path = $false } }
      '--dylora-block-size' = @{ Help = 'Block size, in ranks, that a LyCORIS DyLoRA was trained with'; Value = @{ Words = @(); Endings = $null; Path = $false } }
      '--legacy-loha-cp' = @{ Help = 'LoHa with cores trained before LyCORIS 2.0.0'; Value = $null }
      '--glora-old-scale' = @{ Help = 'Scale of old-layout GLoRA'; Value = @{ Words = @('once', 'twice'); Endings = $null; Path = $false } }
    } }
  }

  function Offer($text, $help) {
    if ($text -like "$wordToComplete*") { [System.Management.Automation.CompletionResult]::new($text, $text, 'ParameterValue', $help) }
  }
  # Folders, and files with one of the endings ($null: every file).
  function OfferFiles($endings) {
    foreach ($found in [System.Management.Automation.CompletionCompleters]::CompleteFilename($wordToComplete)) {
      $name = $found.ListItemText
      if ($found.ResultType -eq 'ProviderContainer' -or $null -eq $endings) { $found }
      elseif ($endings | Where-Object { $name.EndsWith($_) }) { $found }
    }
  }

  $words = @($commandAst.CommandElements | Where-Object { $_.Extent.EndOffset -lt $cursorPosition } |
    ForEach-Object { $_.Extent.Text })
  $command = $words | Select-Object -Skip 1 | Where-Object { $commands.Contains($_) } | Select-Object -First 1
  $previous = $words[-1]
  if ($null -eq $command) {
    if ($previous -eq '--shell') { 'bash', 'zsh', 'fish', 'powershell' | ForEach-Object { Offer $_ $_ } }
    elseif ($wordToComplete -like '-*') { foreach ($flag in $root.Keys) { Offer $flag $root[$flag] } }
    else { foreach ($name in $commands.Keys) { Offer $name $commands[$name].Help } }
    return
  }
  $options = $commands[$command].Options
  if ($options.Contains($previous) -and $null -ne $options[$previous].Value) {
    $value = $options[$previous].Value
    foreach ($word in $value.Words) { Offer $word $word }
    if ($value.Path) { OfferFiles $value.Endings }
  }
  elseif ($wordToComplete -like '-*') { foreach ($flag in $options.Keys) { Offer $flag $options[$flag].Help } }
  else { OfferFiles $commands[$command].Endings }
}
