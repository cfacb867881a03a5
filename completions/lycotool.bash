# Completion for lycotool, made by `lycotool --show-completion --shell bash`. Do not edit.

_lycotool_words() {
  COMPREPLY=($(compgen -W "$*" -- "$cur"))
}

# Folders, and files whose names match the pattern in $1.
_lycotool_files() {
  local IFS=$'\n' name word=${cur//\\/}
  word=${word#[\"\']}
  compopt -o filenames 2>/dev/null
  for name in $(compgen -d -- "$word") $([[ -n $1 ]] && compgen -f -- "$word"); do
    [[ -d ${name/#\~/$HOME} || $name == $1 ]] && COMPREPLY+=("$name")
  done
  # Each folder was named twice.
  [[ ${#COMPREPLY[@]} -gt 0 ]] && COMPREPLY=($(printf '%s\n' "${COMPREPLY[@]}" | sort -u))
}

_lycotool() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= options= i
  COMPREPLY=()
  # `--method=ties` arrives as three words.
  if [[ $cur == = ]]; then cur=
  elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}
  elif [[ $prev == : ]]; then return
  fi
  for ((i = 1; i < COMP_CWORD; i++)); do
    case ${COMP_WORDS[i]} in
      train|merge|bake|resize|extract|inspect|convert) command=${COMP_WORDS[i]}; break ;;
    esac
  done
  case $command:$prev in
    train:-o|train:--output|train:--config|train:--kohya-config|train:--vae|train:--network-weights|train:--log-file|train:--sample-prompts) _lycotool_files '*'; return ;;
    train:--network-arg|train:--clip-skip|train:--dim|train:--alpha|train:--conv-dim|train:--conv-alpha|train:--dropout|train:--rank-dropout|train:--module-dropout|train:--factor|train:--block-size|train:--constraint|train:--loraplus-lr-ratio|train:--loraplus-unet-lr-ratio|train:--loraplus-text-encoder-lr-ratio|train:--num-repeats|train:--image-root|train:--reg-data-dir|train:--prior-loss-weight|train:--validation-split|train:--validation-seed|train:--resolution|train:--batch-size|train:--min-bucket-reso|train:--max-bucket-reso|train:--bucket-reso-steps|train:--caption-extension|train:--class-tokens|train:--caption-prefix|train:--caption-suffix|train:--caption-separator|train:--keep-tokens|train:--keep-tokens-separator|train:--secondary-separator|train:--caption-dropout-rate|train:--caption-dropout-every-n-epochs|train:--caption-tag-dropout-rate|train:--token-warmup-min|train:--token-warmup-step|train:--max-token-length|train:--cache-dir|train:--steps|train:--epochs|train:--gradient-accumulation-steps|train:--seed|train:--optimizer-arg|train:--lr|train:--unet-lr|train:--te-lr|train:--max-grad-norm|train:--scale-weight-norms|train:--lr-warmup-steps|train:--lr-decay-steps|train:--lr-scheduler-num-cycles|train:--lr-scheduler-power|train:--lr-scheduler-min-lr-ratio|train:--lr-scheduler-timescale|train:--lr-scheduler-rules|train:--noise-offset|train:--adaptive-noise-scale|train:--multires-noise-iterations|train:--multires-noise-discount|train:--ip-noise-gamma|train:--min-timestep|train:--max-timestep|train:--huber-c|train:--huber-scale|train:--min-snr-gamma|train:--v-pred-like-loss|train:--gpus|train:--save-every-n-steps|train:--save-every-n-epochs|train:--keep-saves|train:--training-comment|train:--metadata-title|train:--metadata-author|train:--metadata-description|train:--metadata-license|train:--metadata-tags|train:--log-every|train:--validate-every-n-steps|train:--validate-every-n-epochs|train:--max-validation-steps|train:--sample-every-n-steps|train:--sample-every-n-epochs) :; return ;;
    train:--prediction) _lycotool_words epsilon v_prediction; return ;;
    train:--names) _lycotool_words kohya diffusers; return ;;
    train:--algo) _lycotool_words lora locon loha lokr ia3 dylora full glora diag-oft boft; return ;;
    train:--preset) _lycotool_words full full-lin attn-mlp attn-only unet-only unet-transformer-only unet-convblock-only ia3; _lycotool_files '*@(.toml|.json|.jsonl|.txt)'; return ;;
    train:--forward) _lycotool_words auto structured fused; return ;;
    train:--resize-interpolation) _lycotool_words lanczos bicubic bilinear box area nearest; return ;;
    train:--cache-latents|train:--cache-text) _lycotool_words memory disk none; return ;;
    train:--optimizer) _lycotool_words adamw lion prodigy adafactor sgd sgdnesterov adamw8bit pagedadamw8bit pagedadamw lion8bit pagedlion8bit sgdnesterov8bit; return ;;
    train:--lr-scheduler) _lycotool_words constant constant_with_warmup linear cosine cosine_with_restarts polynomial cosine_with_min_lr warmup_stable_decay inverse_sqrt piecewise_constant; return ;;
    train:--loss-type) _lycotool_words l2 l1 huber smooth_l1; return ;;
    train:--huber-schedule) _lycotool_words snr exponential constant; return ;;
    train:--device) _lycotool_words auto cpu cuda mps; return ;;
    train:--precision) _lycotool_words auto bf16 fp16 fp32; return ;;
    train:--vae-precision|train:--save-dtype) _lycotool_words fp32 bf16 fp16; return ;;
    train:--base-dtype) _lycotool_words fp8 int8; return ;;
    train:--format) _lycotool_words networks.lora lycoris.kohya locon.locon_kohya lycoris diffusers diffusers-legacy peft comfyui onetrainer ai-toolkit bfl hcp kohya-oft; return ;;
    train:--resume|train:--tensorboard) _lycotool_files ''; return ;;
    train:--sample-sampler) _lycotool_words ddim ddpm pndm lms euler euler_a heun dpm_2 dpm_2_a dpmsolver dpmsolver++ dpmsingle; return ;;
    merge:-o|merge:--output) _lycotool_files '*'; return ;;
    merge:--dtype) _lycotool_words keep fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2; return ;;
    merge:--metadata) _lycotool_words first union none; return ;;
    merge:--title|merge:--shard-size|merge:--density|merge:--gamma|merge:--epsilon|merge:--lambda|merge:--t|merge:--seed|merge:--rank|merge:--conv-rank|merge:--size|merge:--error|merge:--te|merge:--unet|merge:--lbw-rule|merge:--dylora-block-size) :; return ;;
    merge:--method) _lycotool_words exact svd ties dare dare-ties magnitude-prune della breadcrumbs slerp nuslerp; return ;;
    merge:--normalize) _lycotool_words none count weight; return ;;
    merge:--consensus) _lycotool_words total frequency; return ;;
    merge:--along) _lycotool_words whole rows columns; return ;;
    merge:--compat) _lycotool_words none kohya; return ;;
    merge:--lbw) _lycotool_words NONE ALL INS IND INALL MIDD OUTD OUTS OUTALL ALL0.5; _lycotool_files '*@(.toml|.json|.jsonl|.txt)'; return ;;
    merge:--recipe) _lycotool_files '*@(.toml|.json|.jsonl|.txt)'; return ;;
    merge:--replay|merge:--base|merge:--vae) _lycotool_files '*@(.safetensors|.safetensors.index.json)'; return ;;
    merge:--inputs-dir) _lycotool_files ''; return ;;
    merge:--device) _lycotool_words auto cpu cuda mps; return ;;
    merge:--alpha-zero) _lycotool_words zero rank; return ;;
    merge:--dora-strength) _lycotool_words linear lycoris peft; return ;;
    merge:--glora-old-scale) _lycotool_words once twice; return ;;
    bake:-o|bake:--output) _lycotool_files '*'; return ;;
    bake:--dtype) _lycotool_words keep fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2; return ;;
    bake:--shard-size|bake:--te|bake:--unet|bake:--lbw-rule|bake:--dylora-block-size) :; return ;;
    bake:--vae) _lycotool_files '*@(.safetensors|.safetensors.index.json)'; return ;;
    bake:--lbw) _lycotool_words NONE ALL INS IND INALL MIDD OUTD OUTS OUTALL ALL0.5; _lycotool_files '*@(.toml|.json|.jsonl|.txt)'; return ;;
    bake:--device) _lycotool_words auto cpu cuda mps; return ;;
    bake:--alpha-zero) _lycotool_words zero rank; return ;;
    bake:--dora-strength) _lycotool_words linear lycoris peft; return ;;
    bake:--glora-old-scale) _lycotool_words once twice; return ;;
    resize:--rank|resize:--conv-rank|resize:--param|resize:--size|resize:--error|resize:--unit|resize:--dylora-block-size) :; return ;;
    resize:--method) _lycotool_words fixed threshold sv_ratio sv_cumulative sv_fro sv_knee sv_cumulative_knee sv_rel_decrease; return ;;
    resize:--to) _lycotool_words keep lora; return ;;
    resize:--compat) _lycotool_words none kohya; return ;;
    resize:-o|resize:--output) _lycotool_files '*'; return ;;
    resize:--dtype) _lycotool_words keep fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2; return ;;
    resize:--device) _lycotool_words auto cpu cuda mps; return ;;
    resize:--alpha-zero) _lycotool_words zero rank; return ;;
    extract:--algo) _lycotool_words lora lokr full dora ia3; return ;;
    extract:--mode) _lycotool_words fixed threshold ratio quantile fro full size error; return ;;
    extract:--rank|extract:--conv-rank|extract:--param|extract:--conv-param|extract:--size|extract:--error|extract:--sparsity|extract:--factor|extract:--include|extract:--exclude|extract:--min-diff|extract:--clamp-quantile|extract:--seed) :; return ;;
    extract:--dora-axis) _lycotool_words out in; return ;;
    extract:-o|extract:--output) _lycotool_files '*'; return ;;
    extract:--dtype) _lycotool_words keep fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2; return ;;
    extract:--device) _lycotool_words auto cpu cuda mps; return ;;
    inspect:--top|inspect:--set|inspect:--unset|inspect:--dylora-block-size) :; return ;;
    inspect:--compare|inspect:--base) _lycotool_files '*@(.safetensors|.safetensors.index.json)'; return ;;
    inspect:--plot|inspect:-o|inspect:--output) _lycotool_files '*'; return ;;
    inspect:--device) _lycotool_words auto cpu cuda; return ;;
    inspect:--fail-on) _lycotool_words error warning info; return ;;
    inspect:--sort) _lycotool_words name size rank modules algorithm arch strength findings; return ;;
    inspect:--alpha-zero) _lycotool_words zero rank; return ;;
    inspect:--dora-strength) _lycotool_words linear lycoris peft; return ;;
    inspect:--glora-old-scale) _lycotool_words once twice; return ;;
    convert:--to|convert:--from) _lycotool_words networks.lora lycoris.kohya locon.locon_kohya lycoris diffusers diffusers-legacy peft comfyui onetrainer ai-toolkit bfl hcp kohya-oft; return ;;
    convert:--arch) _lycotool_words sdxl sd1 sd2 chroma flux2 flux1 hunyuan-video-1.5 hunyuan-image hunyuan-video sd3 qwen-image z-image lumina2 anima wan; return ;;
    convert:--algo) _lycotool_words keep lora full; return ;;
    convert:--rank|convert:--error|convert:--dylora-block-size) :; return ;;
    convert:--base) _lycotool_files '*@(.safetensors|.safetensors.index.json)'; return ;;
    convert:-o|convert:--output) _lycotool_files '*'; return ;;
    convert:--dtype) _lycotool_words keep fp32 fp16 bf16 fp8_e4m3fn fp8_e5m2; return ;;
    convert:--alpha-zero) _lycotool_words zero rank; return ;;
    convert:--glora-old-scale) _lycotool_words once twice; return ;;
    *:--shell) _lycotool_words bash zsh fish powershell; return ;;
  esac
  case $command in
    "") if [[ $cur == -* ]]; then options="--version --install-completion --show-completion --shell --help"
        else options="train merge bake resize extract inspect convert"; fi
        _lycotool_words "$options"; return ;;
    train) options="-o --output -f --force -n --dry-run --config --kohya-config --print-config --strict --json -q --quiet --network-arg --prediction --vae --clip-skip --train-unet --no-train-unet --train-te --no-train-te --names --algo --preset --dim --alpha --conv-dim --conv-alpha --rs-lora --no-rs-lora --use-conv-cp --no-use-conv-cp --use-scalar --no-use-scalar --dora-wd --no-dora-wd --wd-on-output --no-wd-on-output --dropout --rank-dropout --rank-dropout-scale --no-rank-dropout-scale --module-dropout --factor --decompose-both --no-decompose-both --full-matrix --no-full-matrix --unbalanced-factorization --no-unbalanced-factorization --block-size --constraint --rescaled --no-rescaled --train-on-input --no-train-on-input --train-norm --no-train-norm --loraplus-lr-ratio --loraplus-unet-lr-ratio --loraplus-text-encoder-lr-ratio --forward --network-weights --dim-from-weights --no-dim-from-weights --num-repeats --recursive --no-recursive --image-root --reg-data-dir --prior-loss-weight --is-reg --no-is-reg --validation-split --validation-seed --resolution --batch-size --enable-bucket --no-enable-bucket --min-bucket-reso --max-bucket-reso --bucket-reso-steps --bucket-no-upscale --no-bucket-no-upscale --caption-extension --class-tokens --allow-missing-captions --no-allow-missing-captions --caption-prefix --caption-suffix --caption-separator --shuffle-caption --no-shuffle-caption --keep-tokens --keep-tokens-separator --secondary-separator --enable-wildcard --no-enable-wildcard --caption-dropout-rate --caption-dropout-every-n-epochs --caption-tag-dropout-rate --token-warmup-min --token-warmup-step --max-token-length --flip-aug --no-flip-aug --random-crop --no-random-crop --resize-interpolation --cache-latents --cache-text --cache-dir --steps --epochs --gradient-accumulation-steps --seed --optimizer --optimizer-arg --lr --unet-lr --te-lr --max-grad-norm --fused-backward --no-fused-backward --scale-weight-norms --lr-scheduler --lr-warmup-steps --lr-decay-steps --lr-scheduler-num-cycles --lr-scheduler-power --lr-scheduler-min-lr-ratio --lr-scheduler-timescale --lr-scheduler-rules --noise-offset --noise-offset-random-strength --no-noise-offset-random-strength --adaptive-noise-scale --multires-noise-iterations --multires-noise-discount --ip-noise-gamma --ip-noise-gamma-random-strength --no-ip-noise-gamma-random-strength --zero-terminal-snr --no-zero-terminal-snr --min-timestep --max-timestep --loss-type --huber-schedule --huber-c --huber-scale --min-snr-gamma --debiased-estimation-loss --no-debiased-estimation-loss --scale-v-pred-loss-like-noise-pred --no-scale-v-pred-loss-like-noise-pred --v-pred-like-loss --device --gpus --precision --vae-precision --base-dtype --gradient-checkpointing --no-gradient-checkpointing --shard-optimizer --no-shard-optimizer --cuda-graphs --no-cuda-graphs --triton --no-triton --save-every-n-steps --save-every-n-epochs --keep-saves --save-dtype --format --split-dylora --no-split-dylora --save-state --no-save-state --save-state-on-train-end --no-save-state-on-train-end --resume --fresh --no-fresh --metadata --no-metadata --training-comment --metadata-title --metadata-author --metadata-description --metadata-license --metadata-tags --log-file --tensorboard --log-every --validate-every-n-steps --validate-every-n-epochs --max-validation-steps --sample-prompts --sample-every-n-steps --sample-every-n-epochs --sample-at-first --no-sample-at-first --sample-sampler --help" ;;
    merge) options="-o --output -f --force --dtype --metadata --title --shard-size --verify --strict -n --dry-run --json -q --quiet --method --density --gamma --epsilon --lambda --normalize --consensus --t --along --seed --compat --concat --rank --conv-rank --size --error --te --unet --lbw --lbw-rule --recipe --replay --inputs-dir --rebuild --base --vae --device --allow-pickle --alpha-zero --dora-strength --dylora-block-size --legacy-loha-cp --glora-old-scale --help" ;;
    bake) options="-o --output -f --force --dtype --shard-size --vae --verify --unbake --te --unet --lbw --lbw-rule --device --allow-pickle --strict -n --dry-run --json -q --quiet --alpha-zero --dora-strength --dylora-block-size --legacy-loha-cp --glora-old-scale --help" ;;
    resize) options="--rank --conv-rank --method --param --size --error --to --keep-refused --split --unit --compat -o --output -f --force --dtype --device --allow-pickle --strict -n --dry-run --json -q --quiet --modules --alpha-zero --dylora-block-size --legacy-loha-cp --help" ;;
    extract) options="--algo --mode --rank --conv-rank --param --conv-param --size --error --use-conv-cp --sparse-bias --sparsity --factor --dora-axis --include --exclude --min-diff --clamp-quantile --seed -o --output -f --force --dtype --device --allow-pickle --strict -n --dry-run --json -q --quiet --modules --help" ;;
    inspect) options="--modules --blocks --metadata --tags --hashes --top --stats --compare --plot --base --device --check --headers-only --fail-on --sort --reverse --set --unset --strip-training-data -o --output --in-place -f --force -n --dry-run --allow-pickle --strict --json -q --quiet --alpha-zero --dora-strength --dylora-block-size --legacy-loha-cp --glora-old-scale --help" ;;
    convert) options="--to --from --arch --drop --algo --rank --error --base --verify --no-verify -o --output -f --force --dtype --allow-pickle --strict -n --dry-run --json -q --quiet --modules --alpha-zero --dylora-block-size --legacy-loha-cp --glora-old-scale --help" ;;
  esac
  if [[ $cur == -?* ]]; then _lycotool_words "$options"; return; fi
  case $command in
    train) _lycotool_files '*@(.safetensors|.safetensors.index.json|.toml|.json|.jsonl|.txt)' ;;
    merge) _lycotool_files '*@(.safetensors|.safetensors.index.json)' ;;
    bake) _lycotool_files '*@(.safetensors|.safetensors.index.json)' ;;
    resize) _lycotool_files '*@(.safetensors|.safetensors.index.json)' ;;
    extract) _lycotool_files '*@(.safetensors|.safetensors.index.json)' ;;
    inspect) _lycotool_files '*@(.safetensors|.safetensors.index.json)' ;;
    convert) _lycotool_files '*@(.safetensors|.safetensors.index.json)' ;;
  esac
}

complete -F _lycotool lycotool
