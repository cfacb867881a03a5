# Completion for lycotool, made by `lycotool --show-completion --shell fish`. Do not edit.

function __lycotool_files --description 'Folders, and files with one of the endings'
    set -l ending (string join '|' -- (string escape --style=regex -- $argv) /)
    __fish_complete_path (commandline -ct) | string match -r "^.*(?:$ending)(?:\t.*)?\$"
end

complete -c lycotool -f
complete -c lycotool -n __fish_use_subcommand -l version -d 'Show the version and exit'
complete -c lycotool -n __fish_use_subcommand -l install-completion -d 'Install completion for the current shell'
complete -c lycotool -n __fish_use_subcommand -l show-completion -d 'Print the completion script of the current shell'
complete -c lycotool -n __fish_use_subcommand -l shell -d 'The shell that --install-completion and --show-completion are for' -x -a 'bash zsh fish powershell'
complete -c lycotool -n __fish_use_subcommand -l help -d 'Show help and exit'
complete -c lycotool -n __fish_use_subcommand -a train -d 'Train an adapter from a base model and captioned images'
complete -c lycotool -n __fish_use_subcommand -a merge -d 'Merge adapters into a checkpoint, or adapters into one adapter'
complete -c lycotool -n __fish_use_subcommand -a bake -d 'Fold adapters of any algorithm into a checkpoint'
complete -c lycotool -n __fish_use_subcommand -a resize -d 'Shrink an adapter\'s ranks, losing as little as that rank allows'
complete -c lycotool -n __fish_use_subcommand -a extract -d 'Write the difference of two checkpoints as an adapter'
complete -c lycotool -n __fish_use_subcommand -a inspect -d 'Show what a file is and what can be done with it'
complete -c lycotool -n __fish_use_subcommand -a convert -d 'Write an adapter in another program\'s format, and verify it'

complete -c lycotool -n '__fish_seen_subcommand_from train' -s h -l help -d 'Show help and exit'
complete -c lycotool -n '__fish_seen_subcommand_from train' -s o -l output -d 'The adapter to write' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from train' -s f -l force -d 'Replace an existing output'
complete -c lycotool -n '__fish_seen_subcommand_from train' -s n -l dry-run -d 'Plan and report, write nothing'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l config -d 'Options as TOML' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from train' -l kohya-config -d 'A training config of sd-scripts (TOML or JSON), with its meaning' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from train' -l print-config -d 'Print all options as TOML, and do nothing else'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l strict -d 'Make warnings errors (exit code 5), before a step is made'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l json -d 'Print one JSON object on stdout'
complete -c lycotool -n '__fish_seen_subcommand_from train' -s q -l quiet -d 'Nothing on stderr but errors'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l network-arg -d 'A network argument by the name sd-scripts or LyCORIS has for it' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l prediction -d 'What the model predicts' -x -a 'epsilon v_prediction'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l vae -d 'Another VAE' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from train' -l clip-skip -d 'Use the text encoder\'s output of this many layers from the end' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l train-unet -l no-train-unet -d 'Train the UNet'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l train-te -l no-train-te -d 'Train the text encoders'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l names -d 'Module names of an SDXL UNet in the file' -x -a 'kohya diffusers'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l algo -d 'Algorithm' -x -a 'lora locon loha lokr ia3 dylora full glora diag-oft boft'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l preset -d 'Which layers' -x -a 'full full-lin attn-mlp attn-only unet-only unet-transformer-only unet-convblock-only ia3 (__lycotool_files .toml .json .jsonl .txt)'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l dim -d 'Rank' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l alpha -d 'The change is scaled by alpha/dim' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l conv-dim -d 'Rank of convolutions with a kernel above 1x1' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l conv-alpha -d 'Alpha of convolutions with a kernel above 1x1' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l rs-lora -l no-rs-lora -d 'Scale by alpha/√dim instead'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l use-conv-cp -l no-use-conv-cp -d 'Give convolutions with a kernel above 1x1 a CP (Tucker) core'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l use-scalar -l no-use-scalar -d 'Start from random factors below a trained scalar that is zero'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l dora-wd -l no-dora-wd -d 'DoRA'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l wd-on-output -l no-wd-on-output -d 'DoRA\'s norms per output row'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l dropout -d 'Part of the change of the output that is dropped, element by element' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l rank-dropout -d 'Part of the ranks dropped in a step' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l rank-dropout-scale -l no-rank-dropout-scale -d 'Divide what rank_dropout keeps by its share'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l module-dropout -d 'Chance of a layer to train nothing in a step' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l factor -d 'LoKr' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l decompose-both -l no-decompose-both -d 'LoKr'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l full-matrix -l no-full-matrix -d 'LoKr'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l unbalanced-factorization -l no-unbalanced-factorization -d 'LoKr'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l block-size -d 'DyLoRA' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l constraint -d 'diag-oft, boft' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l rescaled -l no-rescaled -d 'diag-oft, boft'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l train-on-input -l no-train-on-input -d '(IA)³'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l train-norm -l no-train-norm -d 'Also train the norms of the chosen blocks'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l loraplus-lr-ratio -d 'LoRA+' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l loraplus-unet-lr-ratio -d 'LoRA+ for the UNet' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l loraplus-text-encoder-lr-ratio -d 'LoRA+ for the text encoders' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l forward -d 'How a layer\'s change is computed' -x -a 'auto structured fused'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l network-weights -d 'Adapter file to start from' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from train' -l dim-from-weights -l no-dim-from-weights -d 'Take algorithm, rank, alpha and layers from that file'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l num-repeats -d 'Times each image is used per epoch' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l recursive -l no-recursive -d 'Also read images in subfolders without a repeat number'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l image-root -d 'What names in a metadata file are relative to' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l reg-data-dir -d 'Folder of regularisation images, or of N_class folders of them' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l prior-loss-weight -d 'Factor on the loss of regularisation images' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l is-reg -l no-is-reg -d 'The images are regularisation images'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l validation-split -d 'Part of the images set aside for the validation loss, 0 to 1' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l validation-seed -d 'Which images are set aside' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l resolution -d 'Area of the training images' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l batch-size -d 'Batch size of each GPU' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l enable-bucket -l no-enable-bucket -d 'Keep aspect ratios'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l min-bucket-reso -d 'Shortest side of a bucket' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l max-bucket-reso -d 'Longest side of a bucket' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l bucket-reso-steps -d 'Bucket sides are multiples of this' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l bucket-no-upscale -l no-bucket-no-upscale -d 'Never enlarge images'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l caption-extension -d 'Suffix of caption files' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l class-tokens -d 'Caption of images that have none' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l allow-missing-captions -l no-allow-missing-captions -d 'Train images whose caption is missing or empty with an empty caption'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l caption-prefix -d 'Put before every caption, with a space' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l caption-suffix -d 'Put after every caption, with a space' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l caption-separator -d 'What separates the tags of a caption' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l shuffle-caption -l no-shuffle-caption -d 'Shuffle the tags of a caption at each use'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l keep-tokens -d 'Tags at the start that stay in place and are never dropped' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l keep-tokens-separator -d 'Instead' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l secondary-separator -d 'Text such as ;;; between tags that stay together' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l enable-wildcard -l no-enable-wildcard -d 'Draw one of {a|b|c}, and one line of a caption of several'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l caption-dropout-rate -d 'Chance that a caption is left out, 0 to 1' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l caption-dropout-every-n-epochs -d 'Leave out all captions in every n-th epoch' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l caption-tag-dropout-rate -d 'Chance that a tag is left out, 0 to 1' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l token-warmup-min -d 'Tags used at the first step of the tag warm-up' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l token-warmup-step -d 'When all tags are used' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l max-token-length -d 'How much of a caption is read' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l flip-aug -l no-flip-aug -d 'Mirror half of the images, drawn at each use'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l random-crop -l no-random-crop -d 'Crop at a random place at each use'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l resize-interpolation -d 'How images are resized' -x -a 'lanczos bicubic bilinear box area nearest'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l cache-latents -d 'Where encoded images are kept' -x -a 'memory disk none'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l cache-text -d 'Where encoded captions are kept while no text encoder is trained' -x -a 'memory disk none'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l cache-dir -d 'Folder of caches kept on disk' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l steps -d 'Optimizer steps' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l epochs -d 'Passes over the data, instead of --steps' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l gradient-accumulation-steps -d 'Batches per optimizer step' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l seed -d 'Every random draw of the run follows from it' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l optimizer -d 'adamw, adafactor, lion, prodigy, sgd, sgdnesterov, adamw8bit, …' -x -a 'adamw lion prodigy adafactor sgd sgdnesterov adamw8bit pagedadamw8bit pagedadamw lion8bit pagedlion8bit sgdnesterov8bit'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l optimizer-arg -d 'An argument of the optimizer' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l lr -d 'Learning rate' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l unet-lr -d 'Learning rate of the UNet' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l te-lr -d 'Learning rate of the text encoders, or, given twice, of SDXL\'s first …' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l max-grad-norm -d 'Gradients are scaled down to this norm' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l fused-backward -l no-fused-backward -d 'Move each parameter as soon as its gradient is complete, and free the …'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l scale-weight-norms -d 'After each step, scale down weight changes whose norm is larger' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l lr-scheduler -d 'Shape of the schedule' -x -a 'constant constant_with_warmup linear cosine cosine_with_restarts polynomial cosine_with_min_lr warmup_stable_decay inverse_sqrt piecewise_constant'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l lr-warmup-steps -d 'The learning rate rises from 0 in so many steps' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l lr-decay-steps -d 'It falls in the last so many steps (warmup_stable_decay)' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l lr-scheduler-num-cycles -d 'Cycles of a cosine' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l lr-scheduler-power -d 'Exponent of polynomial' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l lr-scheduler-min-lr-ratio -d 'Smallest factor of cosine_with_min_lr and warmup_stable_decay' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l lr-scheduler-timescale -d 'Time scale of inverse_sqrt' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l lr-scheduler-rules -d 'Factors of piecewise_constant' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l noise-offset -d 'Strength of a random shift of each channel' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l noise-offset-random-strength -l no-noise-offset-random-strength -d 'Draw that strength for each image, up to the given one'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l adaptive-noise-scale -d 'Add this times the mean latent of a channel to its noise offset' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l multires-noise-iterations -d 'Levels of multi-resolution noise' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l multires-noise-discount -d 'Factor on each coarser level' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l ip-noise-gamma -d 'Strength of noise added to the input alone (input perturbation)' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l ip-noise-gamma-random-strength -l no-ip-noise-gamma-random-strength -d 'Draw that strength for each image, up to the given one'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l zero-terminal-snr -l no-zero-terminal-snr -d 'Rescale the noise schedule to end in pure noise'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l min-timestep -d 'First time step that is drawn' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l max-timestep -d 'Time step before which drawing ends' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l loss-type -d 'Loss of each element' -x -a 'l2 l1 huber smooth_l1'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l huber-schedule -d 'How the threshold of huber and smooth_l1 follows the noise' -x -a 'snr exponential constant'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l huber-c -d 'That threshold' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l huber-scale -d 'Factor on it, for the schedules constant and exponential' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l min-snr-gamma -d 'Min-SNR weighting with this γ' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l debiased-estimation-loss -l no-debiased-estimation-loss -d 'Debiased estimation weighting'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l scale-v-pred-loss-like-noise-pred -l no-scale-v-pred-loss-like-noise-pred -d 'Weigh a v-prediction loss as that of the noise'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l v-pred-like-loss -d 'Add the loss as v-prediction weighs it, times this' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l device -d 'Where to compute' -x -a 'auto cpu cuda mps'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l gpus -d 'Train on so many GPUs, a process and --batch-size images on each' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l precision -d 'Of the base model' -x -a 'auto bf16 fp16 fp32'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l vae-precision -d 'Of the VAE' -x -a 'fp32 bf16 fp16'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l base-dtype -d 'Hold the frozen weights of layers in 8 bits' -x -a 'fp8 int8'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l gradient-checkpointing -l no-gradient-checkpointing -d 'Compute activations again for the gradient'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l shard-optimizer -l no-shard-optimizer -d 'Shard the optimizer over the processes of --gpus, each of which keeps …'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l cuda-graphs -l no-cuda-graphs -d 'Record a step on a GPU once for each shape of a batch, and replay it'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l triton -l no-triton -d 'Own kernels for norms and gated activations on an NVIDIA GPU in half …'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l save-every-n-steps -d 'Also save the adapter every so many steps' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l save-every-n-epochs -d 'Also save it every so many epochs' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l keep-saves -d 'Keep so many of these, the latest' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l save-dtype -d 'dtype of the adapter\'s file' -x -a 'fp32 bf16 fp16'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l format -d 'Format of the file' -x -a 'networks.lora lycoris.kohya locon.locon_kohya lycoris diffusers diffusers-legacy peft comfyui onetrainer ai-toolkit bfl hcp kohya-oft'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l split-dylora -l no-split-dylora -d 'Also save a DyLoRA as one LoRA for each multiple of its block size'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l save-state -l no-save-state -d 'Keep what a resume needs beside the output, at every save and …'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l save-state-on-train-end -l no-save-state-on-train-end -d 'Keep it when the run is complete, too'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l resume -d 'Continue from this folder' -x -a '(__fish_complete_directories)'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l fresh -l no-fresh -d 'Start anew, whatever OUTPUT.state holds'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l metadata -l no-metadata -d 'Write the training\'s numbers'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l training-comment -d 'A comment (ss_training_comment)' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l metadata-title -d 'Title' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l metadata-author -d 'Author' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l metadata-description -d 'Description' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l metadata-license -d 'Licence' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l metadata-tags -d 'Tags, with commas' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l log-file -d 'Write a JSON object per line' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from train' -l tensorboard -d 'Write TensorBoard\'s files to this folder' -x -a '(__fish_complete_directories)'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l log-every -d 'Fetch losses from the device every so many steps' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l validate-every-n-steps -d 'Validate every so many steps' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l validate-every-n-epochs -d 'Validate every so many epochs' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l max-validation-steps -d 'Use so many batches at most' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l sample-prompts -d 'Prompts, one per line, with --n --w --h --d --s --l --ss' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from train' -l sample-every-n-steps -d 'Make images every so many steps' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l sample-every-n-epochs -d 'Make images every so many epochs' -x
complete -c lycotool -n '__fish_seen_subcommand_from train' -l sample-at-first -l no-sample-at-first -d 'Make images before the first step, too'
complete -c lycotool -n '__fish_seen_subcommand_from train' -l sample-sampler -d 'Sampler of prompts that name none' -x -a 'ddim ddpm pndm lms euler euler_a heun dpm_2 dpm_2_a dpmsolver dpmsolver++ dpmsingle'
complete -c lycotool -n '__fish_seen_subcommand_from train' -a '(__lycotool_files .safetensors .safetensors.index.json .toml .json .jsonl .txt)'

complete -c lycotool -n '__fish_seen_subcommand_from merge' -s h -l help -d 'Show help and exit'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -s o -l output -d 'Where to write' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from merge' -s f -l force -d 'Replace an existing output'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l dtype -d 'Saved dtype' -x -a 'keep fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l metadata -d 'Whose metadata an adapter merge keeps' -x -a 'first union none'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l title -d 'modelspec.title of a checkpoint' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l shard-size -d 'Write a checkpoint as files of at most this size and an index' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l verify -d 'Read the output before it gets its name and compare it with float64'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l strict -d 'Make warnings errors (exit code 5), before anything is written'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -s n -l dry-run -d 'Plan and report, write nothing'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l json -d 'Print one JSON object on stdout'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -s q -l quiet -d 'Nothing on stderr but errors'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l method -d 'How the changes w·ΔW become one' -x -a 'exact svd ties dare dare-ties magnitude-prune della breadcrumbs slerp nuslerp'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l density -d 'Share of each layer\'s elements to keep' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l gamma -d 'breadcrumbs' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l epsilon -d 'della' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l lambda -d 'Factor of the combined change' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l normalize -d 'Divide by nothing, by how many adapters agree, or by the sum of their …' -x -a 'none count weight'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l consensus -d 'Elected sign' -x -a 'total frequency'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l t -d 'slerp' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l along -d 'nuslerp' -x -a 'whole rows columns'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l seed -d 'For dare, dare-ties and della' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l compat -d 'kohya' -x -a 'none kohya'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l concat -d 'With --compat kohya, its --concat'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l rank -d 'Truncate the merged adapter to LoRA factors of this rank' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l conv-rank -d 'Rank of kernels larger than 1' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l size -d 'Largest size of the file, 32MB (decimal) or 30MiB (binary)' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l error -d 'Relative error of the whole file' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l te -d 'Factor for text encoders' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l unet -d 'Factor for the UNet or transformer' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l lbw -d 'Factors by block' -x -a 'NONE ALL INS IND INALL MIDD OUTD OUTS OUTALL ALL0.5 (__lycotool_files .toml .json .jsonl .txt)'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l lbw-rule -d 'Factor for layers of some blocks, such as IN05-OUT05:attn:0.5' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l recipe -d 'Read inputs and options from a TOML file' -x -a '(__lycotool_files .toml .json .jsonl .txt)'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l replay -d 'Merge again what OUTPUT\'s metadata say it was merged from, and compare …' -x -a '(__lycotool_files .safetensors .safetensors.index.json)'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l inputs-dir -d 'Where --replay looks for the inputs first' -x -a '(__fish_complete_directories)'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l rebuild -d 'Merge what the rules refuse, by rebuilding the weight change'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l base -d 'Checkpoint for algorithms whose change depends on it' -x -a '(__lycotool_files .safetensors .safetensors.index.json)'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l vae -d 'Replace the checkpoint\'s VAE by this file\'s or folder\'s, in LDM or …' -x -a '(__lycotool_files .safetensors .safetensors.index.json)'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l device -d 'Where to compute' -x -a 'auto cpu cuda mps'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l allow-pickle -d 'Read .pt, .ckpt and .bin files too (plain tensors only)'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l alpha-zero -d 'What a stored alpha of 0 means' -x -a 'zero rank'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l dora-strength -d 'How DoRA follows a strength other than 1' -x -a 'linear lycoris peft'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l dylora-block-size -d 'Block size, in ranks, that a LyCORIS DyLoRA was trained with' -x
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l legacy-loha-cp -d 'LoHa with cores trained before LyCORIS 2.0.0'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -l glora-old-scale -d 'Scale of old-layout GLoRA' -x -a 'once twice'
complete -c lycotool -n '__fish_seen_subcommand_from merge' -a '(__lycotool_files .safetensors .safetensors.index.json)'

complete -c lycotool -n '__fish_seen_subcommand_from bake' -s h -l help -d 'Show help and exit'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -s o -l output -d 'Where to write' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from bake' -s f -l force -d 'Replace an existing output'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l dtype -d 'Saved dtype' -x -a 'keep fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l shard-size -d 'Write a checkpoint as files of at most this size and an index' -x
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l vae -d 'Replace the checkpoint\'s VAE by this file\'s or folder\'s, in LDM or …' -x -a '(__lycotool_files .safetensors .safetensors.index.json)'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l verify -d 'Read the output before it gets its name and compare it with float64'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l unbake -d 'Take the adapters out again, and say how exactly'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l te -d 'Factor for text encoders' -x
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l unet -d 'Factor for the UNet or transformer' -x
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l lbw -d 'Factors by block' -x -a 'NONE ALL INS IND INALL MIDD OUTD OUTS OUTALL ALL0.5 (__lycotool_files .toml .json .jsonl .txt)'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l lbw-rule -d 'Factor for layers of some blocks, such as IN05-OUT05:attn:0.5' -x
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l device -d 'Where to compute' -x -a 'auto cpu cuda mps'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l allow-pickle -d 'Read .pt, .ckpt and .bin files too (plain tensors only)'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l strict -d 'Make warnings errors (exit code 5), before anything is written'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -s n -l dry-run -d 'Plan and report, write nothing'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l json -d 'Print one JSON object on stdout'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -s q -l quiet -d 'Nothing on stderr but errors'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l alpha-zero -d 'What a stored alpha of 0 means' -x -a 'zero rank'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l dora-strength -d 'How DoRA follows a strength other than 1' -x -a 'linear lycoris peft'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l dylora-block-size -d 'Block size, in ranks, that a LyCORIS DyLoRA was trained with' -x
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l legacy-loha-cp -d 'LoHa with cores trained before LyCORIS 2.0.0'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -l glora-old-scale -d 'Scale of old-layout GLoRA' -x -a 'once twice'
complete -c lycotool -n '__fish_seen_subcommand_from bake' -a '(__lycotool_files .safetensors .safetensors.index.json)'

complete -c lycotool -n '__fish_seen_subcommand_from resize' -s h -l help -d 'Show help and exit'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l rank -d 'New rank' -x
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l conv-rank -d 'Rank of kernels larger than 1' -x
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l method -d 'How each module\'s rank is chosen from its singular values' -x -a 'fixed threshold sv_ratio sv_cumulative sv_fro sv_knee sv_cumulative_knee sv_rel_decrease'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l param -d 'The method\'s number' -x
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l size -d 'Largest size of the file, 32MB (decimal) or 30MiB (binary)' -x
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l error -d 'Relative error of the whole file' -x
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l to -d 'Convert LoHa and LoKr exactly to LoRA first' -x -a 'keep lora'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l keep-refused -d 'Carry modules that the rules refuse over unchanged'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l split -d 'Slice a DyLoRA into one file per multiple of --unit, in the folder -o, …'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l unit -d 'The DyLoRA\'s unit (block size), in ranks' -x
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l compat -d 'kohya' -x -a 'none kohya'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -s o -l output -d 'Where to write' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from resize' -s f -l force -d 'Replace an existing output'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l dtype -d 'Saved dtype' -x -a 'keep fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l device -d 'Where to compute' -x -a 'auto cpu cuda mps'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l allow-pickle -d 'Read .pt, .ckpt and .bin files too (plain tensors only)'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l strict -d 'Make warnings errors (exit code 5), before anything is written'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -s n -l dry-run -d 'Plan and report, write nothing'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l json -d 'Print one JSON object on stdout'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -s q -l quiet -d 'Nothing on stderr but errors'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l modules -d 'Report every module'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l alpha-zero -d 'What a stored alpha of 0 means' -x -a 'zero rank'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l dylora-block-size -d 'Block size, in ranks, that a LyCORIS DyLoRA was trained with' -x
complete -c lycotool -n '__fish_seen_subcommand_from resize' -l legacy-loha-cp -d 'LoHa with cores trained before LyCORIS 2.0.0'
complete -c lycotool -n '__fish_seen_subcommand_from resize' -a '(__lycotool_files .safetensors .safetensors.index.json)'

complete -c lycotool -n '__fish_seen_subcommand_from extract' -s h -l help -d 'Show help and exit'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l algo -d 'What the difference becomes' -x -a 'lora lokr full dora ia3'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l mode -d 'How each layer\'s rank is chosen from its singular values' -x -a 'fixed threshold ratio quantile fro full size error'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l rank -d 'Rank of mode fixed, cap of the others' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l conv-rank -d 'Rank of kernels larger than 1' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l param -d 'The mode\'s number' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l conv-param -d 'The mode\'s number for kernels larger than 1' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l size -d 'Largest file of mode size, 64MB (decimal) or 60MiB (binary)' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l error -d 'Relative error of the whole file, of mode error' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l use-conv-cp -d 'Convolutions with a CP (Tucker) core'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l sparse-bias -d 'Also keep the largest entries that the factors leave'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l sparsity -d 'Share of entries the sparse part leaves out' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l factor -d 'LoKr\'s factor' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l dora-axis -d 'Which axis DoRA keeps the norms of' -x -a 'out in'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l include -d 'Only these layers, by adapter or checkpoint name' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l exclude -d 'Not these layers' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l min-diff -d 'Skip layers whose largest difference of an element is no more than this' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l clamp-quantile -d 'Cut the factors at this quantile of their sizes, as older tools do at …' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l seed -d 'For the random start of the approximation' -x
complete -c lycotool -n '__fish_seen_subcommand_from extract' -s o -l output -d 'Where to write' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from extract' -s f -l force -d 'Replace an existing output'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l dtype -d 'Saved dtype' -x -a 'keep fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l device -d 'Where to compute' -x -a 'auto cpu cuda mps'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l allow-pickle -d 'Read .pt, .ckpt and .bin files too (plain tensors only)'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l strict -d 'Make warnings errors (exit code 5), before anything is written'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -s n -l dry-run -d 'Plan and report, write nothing'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l json -d 'Print one JSON object on stdout'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -s q -l quiet -d 'Nothing on stderr but errors'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -l modules -d 'Report every module'
complete -c lycotool -n '__fish_seen_subcommand_from extract' -a '(__lycotool_files .safetensors .safetensors.index.json)'

complete -c lycotool -n '__fish_seen_subcommand_from inspect' -s h -l help -d 'Show help and exit'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l modules -d 'Show every module'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l blocks -d 'Count modules by block of the model'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l metadata -d 'Show all metadata, decoded'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l tags -d 'Count the tags of the training captions, all data sets together'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l hashes -d 'SHA-256, AutoV2 and AutoV3'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l top -d 'Lines of long tables (tags, strongest modules, least alike layers)' -x
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l stats -d 'Strength of each module\'s change ΔW, its ranks by several measures, …'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l compare -d 'Put another adapter beside this one' -x -a '(__lycotool_files .safetensors .safetensors.index.json)'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l plot -d 'Draw what --stats or --compare measures' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l base -d 'Checkpoint to measure against' -x -a '(__lycotool_files .safetensors .safetensors.index.json)'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l device -d 'Where to measure, in float64' -x -a 'auto cpu cuda'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l check -d 'Look for faults and oddities, reading everything'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l headers-only -d 'With --check'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l fail-on -d 'The least finding that ends with exit code 10' -x -a 'error warning info'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l sort -d 'Order of several files' -x -a 'name size rank modules algorithm arch strength findings'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l reverse -d 'Largest or last first'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l set -d 'Set a metadata key' -x
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l unset -d 'Take a metadata key out, or all that fit a pattern such as ss_*' -x
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l strip-training-data -d 'Take out captions, folders, settings and times of training'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -s o -l output -d 'Where to write the edited file' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l in-place -d 'Replace the file itself, whole or not at all'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -s f -l force -d 'Replace an existing output'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -s n -l dry-run -d 'Report the edit, write nothing'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l allow-pickle -d 'Read .pt, .ckpt and .bin files too (plain tensors only)'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l strict -d 'Make warnings errors (exit code 5), before anything is written'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l json -d 'Print one JSON object on stdout'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -s q -l quiet -d 'Nothing on stderr but errors'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l alpha-zero -d 'What a stored alpha of 0 means' -x -a 'zero rank'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l dora-strength -d 'How DoRA follows a strength other than 1' -x -a 'linear lycoris peft'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l dylora-block-size -d 'Block size, in ranks, that a LyCORIS DyLoRA was trained with' -x
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l legacy-loha-cp -d 'LoHa with cores trained before LyCORIS 2.0.0'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -l glora-old-scale -d 'Scale of old-layout GLoRA' -x -a 'once twice'
complete -c lycotool -n '__fish_seen_subcommand_from inspect' -a '(__lycotool_files .safetensors .safetensors.index.json)'

complete -c lycotool -n '__fish_seen_subcommand_from convert' -s h -l help -d 'Show help and exit'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l to -d 'Whose format to write' -x -a 'networks.lora lycoris.kohya locon.locon_kohya lycoris diffusers diffusers-legacy peft comfyui onetrainer ai-toolkit bfl hcp kohya-oft'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l from -d 'Whose format the file is in, by the same names' -x -a 'networks.lora lycoris.kohya locon.locon_kohya lycoris diffusers diffusers-legacy peft comfyui onetrainer ai-toolkit bfl hcp kohya-oft'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l arch -d 'The model it is for' -x -a 'sdxl sd1 sd2 chroma flux2 flux1 hunyuan-video-1.5 hunyuan-image hunyuan-video sd3 qwen-image z-image lumina2 anima wan'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l drop -d 'Leave out what the format cannot hold'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l algo -d 'Also change the algorithm' -x -a 'keep lora full'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l rank -d 'Rank of what has no exact LoRA form' -x
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l error -d 'Or its relative error, by module' -x
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l base -d 'Checkpoint for algorithms whose change depends on it' -x -a '(__lycotool_files .safetensors .safetensors.index.json)'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l verify -l no-verify -d 'Compare the change of every module with the written file\'s'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -s o -l output -d 'Where to write' -r -F
complete -c lycotool -n '__fish_seen_subcommand_from convert' -s f -l force -d 'Replace an existing output'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l dtype -d 'Saved dtype' -x -a 'keep fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l allow-pickle -d 'Read .pt, .ckpt and .bin files too (plain tensors only)'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l strict -d 'Make warnings errors (exit code 5), before anything is written'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -s n -l dry-run -d 'Plan and report, write nothing'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l json -d 'Print one JSON object on stdout'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -s q -l quiet -d 'Nothing on stderr but errors'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l modules -d 'Report every module'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l alpha-zero -d 'What a stored alpha of 0 means' -x -a 'zero rank'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l dylora-block-size -d 'Block size, in ranks, that a LyCORIS DyLoRA was trained with' -x
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l legacy-loha-cp -d 'LoHa with cores trained before LyCORIS 2.0.0'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -l glora-old-scale -d 'Scale of old-layout GLoRA' -x -a 'once twice'
complete -c lycotool -n '__fish_seen_subcommand_from convert' -a '(__lycotool_files .safetensors .safetensors.index.json)'
