"""The register of mutants: single changed lines, each with the test that must fail by it.

    make mutants                    all of them
    make mutants ONLY=guard         those whose area, name, file or test has that in it

A mutant says what would be wrong in words. Its old text is a piece of one line that is in the file exactly once: who
writes that line anew writes its mutants anew, and finds them by `tests/unit/test_mutants.py`. The test is the cheapest
that sees the fault. How they are run: `support.mutation`.
"""

from support.mutation import Mutant, main


def mutants(area: str, file: str, tests: str, *rows: tuple[str, str, str, str]) -> list[Mutant]:
    """Mutants of one file, each as its name, old text, new text and test: a function of the file `tests`, or a node."""
    return [
        Mutant(area, name, file, old, new, test if "::" in test else f"{tests}::{test}")
        for name, old, new, test in rows
    ]


MUTANTS = (
    # --- flow matching ---
    *mutants(
        "flow matching",
        "kairos_train/objective/flow_matching.py",
        "tests/unit/objective/test_flow_matching.py",
        (
            "the video's target has the wrong sign",
            "video_target=noise - latents,",
            "video_target=latents - noise,",
            "test_noisy_data_and_targets_follow_the_definition_and_history_is_clean",
        ),
        (
            "the action's target has the wrong sign",
            "batch.action_target = action_noise - actions",
            "batch.action_target = actions - action_noise",
            "test_actions_have_a_timestep_noise_target_and_weight_of_their_own",
        ),
        (
            "the action loss is weighted at the video's timestep",
            "batch.action_weight = weights[action_index]",
            "batch.action_weight = weights[video_index]",
            "test_actions_have_a_timestep_noise_target_and_weight_of_their_own",
        ),
        (
            "the action's σ is drawn with the video's index",
            "batch.action_sigma = sigmas[action_index]",
            "batch.action_sigma = sigmas[video_index]",
            "test_actions_have_a_timestep_noise_target_and_weight_of_their_own",
        ),
        (
            "the action's weights are of the video's table",
            "sigmas, weights = self._table(self.stage.action_shift)",
            "sigmas, _ = self._table(self.stage.action_shift)",
            "test_actions_have_a_timestep_noise_target_and_weight_of_their_own",
        ),
        (
            "actions are noised by the video's σ",
            "batch.action = _noisy(actions, action_noise, batch.action_sigma)",
            "batch.action = _noisy(actions, action_noise, batch.video_sigma)",
            "test_actions_have_a_timestep_noise_target_and_weight_of_their_own",
        ),
        (
            "the model is told the video's timestep for the actions",
            "None if self.action_sigma is None else self.action_sigma * 1000",
            "None if self.action_sigma is None else self.video_sigma * 1000",
            "test_the_model_is_given_each_streams_timestep_and_all_that_was_drawn",
        ),
        (
            "the model is told σ for the action's timestep",
            "None if self.action_sigma is None else self.action_sigma * 1000",
            "self.action_sigma",
            "test_the_model_is_given_each_streams_timestep_and_all_that_was_drawn",
        ),
        (
            "the model is not told the history",
            '"history_frames": self.history,',
            '"history_frames": [0] * len(self.history),',
            "test_the_model_is_given_each_streams_timestep_and_all_that_was_drawn",
        ),
        (
            "the model is not told which actions are padding",
            '"action_mask": self.action_mask,',
            '"action_mask": None,',
            "test_the_model_is_given_each_streams_timestep_and_all_that_was_drawn",
        ),
        (
            "the model is not told which text is padding",
            '"context_mask": self.context_mask,',
            '"context_mask": None,',
            "test_the_model_is_given_each_streams_timestep_and_all_that_was_drawn",
        ),
        (
            "the model is not told the robot's state",
            '"state": self.state,',
            '"state": None,',
            "test_the_model_is_given_each_streams_timestep_and_all_that_was_drawn",
        ),
        (
            "i2v leaves the text mask of a longer prompt",
            "context[i], mask[i] = 0, False",
            "context[i] = 0",
            "test_the_empty_prompt_of_i2v_leaves_nothing_of_a_longer_one",
        ),
        (
            "i2v leaves the text of a longer prompt",
            "context[i], mask[i] = 0, False",
            "mask[i] = False",
            "test_the_empty_prompt_of_i2v_leaves_nothing_of_a_longer_one",
        ),
        (
            "i2v does not show the empty prompt",
            "mask[i, : len(empty)] = empty, True",
            "mask[i, : len(empty)] = empty, False",
            "test_the_empty_prompt_of_i2v_leaves_nothing_of_a_longer_one",
        ),
        (
            "i2v gives no frames",
            'HISTORY_CONDITIONS = ("ti2v", "i2v")',
            'HISTORY_CONDITIONS = ("ti2v",)',
            "test_conditions_set_history_and_context",
        ),
        (
            "classifier-free dropout keeps the prompt",
            "if draw.condition in WITHOUT_CONTEXT or draw.drop_context:",
            "if draw.condition in WITHOUT_CONTEXT:",
            "test_a_dropped_context_is_zeros_under_its_mask",
        ),
        (
            "a zeroed context loses its mask",
            "context[i] = 0  # the mask is kept",
            "context[i], mask[i] = 0, False  # the mask is kept",
            "test_conditions_set_history_and_context",
        ),
        (
            "the shift forgets the patches",
            "height, width = latents.shape[-2] // self.patch[0], latents.shape[-1] // self.patch[1]",
            "height, width = latents.shape[-2:]",
            "test_sigmas_come_from_the_shifted_tables_of_each_stream",
        ),
        (
            "the shift is of one frame",
            "schedule.video_shift(latents.shape[2], height * width)",
            "schedule.video_shift(1, height * width)",
            "test_sigmas_come_from_the_shifted_tables_of_each_stream",
        ),
        (
            "one more frame than the history is clean",
            "batch.latents[i, :, :known] = latents[i, :, :known]",
            "batch.latents[i, :, : known + 1] = latents[i, :, : known + 1]",
            "test_noisy_data_and_targets_follow_the_definition_and_history_is_clean",
        ),
        (
            "history is one frame whatever the stage says",
            "history = [self.stage.history_frames if",
            "history = [1 if",
            "test_shares_within_the_history_count_nothing",
        ),
        (
            "the last history frame carries no loss but the first generated one",
            "counted = (number >= known[:, None])",
            "counted = (number > known[:, None])",
            "test_the_loss_counts_neither_history_nor_padding",
        ),
        (
            "infinite history frames reach the loss",
            "error = torch.where(counted, _float(video) - batch.video_target[:, :, frames.start : frames.stop], 0.0)",
            "error = counted * (_float(video) - batch.video_target[:, :, frames.start : frames.stop])",
            "test_the_loss_counts_neither_history_nor_padding",
        ),
        (
            "the video's loss is not weighted",
            "video_sum = batch.video_weight * error.pow(2)",
            "video_sum = error.pow(2)",
            "test_each_stream_is_weighed_at_its_own_timestep",
        ),
        (
            "the video's loss is a mean, not a sum",
            "video_sum = batch.video_weight * error.pow(2).flatten(1).sum(1)",
            "video_sum = batch.video_weight * error.pow(2).flatten(1).mean(1)",
            "test_each_stream_is_weighed_at_its_own_timestep",
        ),
        (
            "the action's loss is weighted by the video's weight",
            "batch.action_weight * error.flatten(1).sum(1)",
            "batch.video_weight * error.flatten(1).sum(1)",
            "test_each_stream_is_weighed_at_its_own_timestep",
        ),
        (
            "a dummy of actions is left out of the graph",
            "return LossSums(video_sum + 0.0 * action.sum(), None)",
            "return LossSums(video_sum, None)",
            "test_a_dummy_of_actions_adds_nothing_and_keeps_its_gradient",
        ),
        (
            "a dummy of actions counts",
            "return LossSums(video_sum + 0.0 * action.sum(), None)",
            "return LossSums(video_sum + action.sum(), None)",
            "test_a_dummy_of_actions_adds_nothing_and_keeps_its_gradient",
        ),
        (
            "padded actions carry loss",
            "error = torch.where(batch.action_mask[..., None], _float(action) - batch.action_target, 0.0)",
            "error = _float(action) - batch.action_target",
            "test_the_loss_counts_neither_history_nor_padding",
        ),
        (
            "action dimensions are not weighed",
            "error = error.pow(2) * self._dim_weights(batch, error)[:, None]",
            "error = error.pow(2)",
            "test_action_dimensions_are_weighed",
        ),
        (
            "weights of the dimensions that are there do not sum to 1",
            "return own / own.sum(1, keepdim=True)",
            "return own",
            "test_dimensions_a_sample_does_not_have_are_zero_to_the_model_and_out_of_the_loss",
        ),
        (
            "absent action dimensions are noise",
            "action_noise = action_noise * action_dim_mask[:, None]",
            "action_noise = action_noise",
            "test_dimensions_a_sample_does_not_have_are_zero_to_the_model_and_out_of_the_loss",
        ),
        (
            "plain weighting where the bell is asked for",
            'bell = self.stage.loss_weighting == "bell"',
            'bell = self.stage.loss_weighting != "bell"',
            "test_the_bell_weighs_each_sample_by_its_own_timestep",
        ),
        (
            "a share before the history's end counts a negative number",
            "return [max(0, frames.stop - max(frames.start, k)) *",
            "return [(frames.stop - max(frames.start, k)) *",
            "test_shares_within_the_history_count_nothing",
        ),
        (
            "history frames are counted",
            "return [max(0, frames.stop - max(frames.start, k)) *",
            "return [max(0, frames.stop - frames.start) *",
            "test_shares_within_the_history_count_nothing",
        ),
    ),
    *mutants(
        "flow matching",
        "kairos_train/objective/schedule.py",
        "tests/unit/objective/test_schedule.py",
        (
            "the video's shift is clamped below",
            "(tokens_per_frame - 256) / (8192 - 256)",
            "max(tokens_per_frame - 256, 0) / (8192 - 256)",
            "test_the_video_shift_goes_on_beyond_its_two_points",
        ),
        (
            "the video's shift misses its second point",
            "(tokens_per_frame - 256) / (8192 - 256)",
            "(tokens_per_frame - 256) / 8192",
            "test_the_video_shift_goes_on_beyond_its_two_points",
        ),
        (
            "the video's shift does not grow with the frames",
            "return math.exp(mu) * math.sqrt(latent_frames)",
            "return math.exp(mu)",
            "test_the_video_shift_goes_on_beyond_its_two_points",
        ),
        (
            "a shift by the wrong formula",
            "return shift * sigmas / (1 + (shift - 1) * sigmas)",
            "return shift * sigmas / (1 + shift * sigmas)",
            "test_distilled_schedule_uses_the_constant_shift",
        ),
        (
            "the table has a zero for its last σ",
            "torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]",
            "torch.linspace(1, 0, steps, dtype=torch.float64)",
            "tests/unit/inference/test_sampler.py::test_sampling_integrates_the_velocity_over_its_own_schedule",
        ),
        (
            "the distilled model has another shift",
            "DISTILLED_SHIFT = 5.0",
            "DISTILLED_SHIFT = 3.0",
            "test_distilled_schedule_uses_the_constant_shift",
        ),
        (
            "the bell does not touch zero",
            "bell = bell - bell.min()",
            "bell = bell",
            "test_bell_weights_have_mean_one_and_touch_zero",
        ),
        (
            "the bell's mean is not 1",
            "return bell / bell.mean()",
            "return bell / bell.max()",
            "test_bell_weights_have_mean_one_and_touch_zero",
        ),
    ),
    # --- seeds ---
    *mutants(
        "seeds",
        "kairos_train/objective/randomness.py",
        "tests/unit/objective/test_flow_matching.py",
        (
            "draws do not depend on the seed",
            'f"{seed}\\0{step}\\0{key}"',
            'f"{step}\\0{key}"',
            "test_what_is_drawn_for_one_thing_says_nothing_of_another_and_depends_on_the_seed",
        ),
        (
            "draws do not depend on the step",
            'f"{seed}\\0{step}\\0{key}"',
            'f"{seed}\\0{key}"',
            "test_what_a_sample_draws_does_not_depend_on_its_batch_or_place",
        ),
        (
            "draws do not depend on the sample",
            'f"{seed}\\0{step}\\0{key}"',
            'f"{seed}\\0{step}"',
            "test_what_is_drawn_for_one_thing_says_nothing_of_another_and_depends_on_the_seed",
        ),
        (
            "both streams have one timestep",
            "action_index=indices[1],",
            "action_index=indices[0],",
            "test_what_is_drawn_for_one_thing_says_nothing_of_another_and_depends_on_the_seed",
        ),
        (
            "the caption follows the condition",
            "caption=caption,",
            "caption=condition,",
            "test_what_is_drawn_for_one_thing_says_nothing_of_another_and_depends_on_the_seed",
        ),
        (
            "dropout at the opposite rate",
            "drop_context=dropout < stage.cfg_dropout",
            "drop_context=dropout > stage.cfg_dropout",
            "test_dropout_and_mixed_conditions_come_at_their_rates",
        ),
        (
            "intervals of choices are closed above",
            "if draw < total:",
            "if draw <= total:",
            "test_a_choice_falls_by_sorted_name_into_half_open_intervals",
        ),
        (
            "choices fall by the order of the settings",
            "sorted(name for name, p in shares.items() if p > 0)",
            "list(name for name, p in shares.items() if p > 0)",
            "test_a_choice_falls_by_sorted_name_into_half_open_intervals",
        ),
        (
            "images are drawn from the conditions of clips",
            "pick(stage.image_conditions if frames == 1 else stage.conditions, condition)",
            "pick(stage.conditions, condition)",
            "test_images_have_conditions_of_their_own_and_no_history",
        ),
    ),
    *mutants(
        "seeds",
        "kairos_train/model/initialise.py",
        "tests/unit/model/test_initialise.py",
        ("initial weights do not depend on the seed", 'f"{seed}/{name}"', 'f"{name}"', "test_seeds_and_names_decide"),
        ("initial weights do not depend on the name", 'f"{seed}/{name}"', 'f"{seed}"', "test_seeds_and_names_decide"),
    ),
    # --- precision ---
    *mutants(
        "precision",
        "kairos_train/model/precision.py",
        "tests/unit/model/test_precision.py",
        (
            "bfloat16 is not widened",
            "return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype",
            "return torch.float32 if dtype in (torch.float16,) else dtype",
            "test_only_sixteen_bits_are_widened",
        ),
        (
            "float16 is not widened",
            "return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype",
            "return torch.float32 if dtype in (torch.bfloat16,) else dtype",
            "test_only_sixteen_bits_are_widened",
        ),
        (
            "the timestep MLPs compute in bfloat16",
            "return F.linear(upcast(x), upcast(self.weight), upcast(self.bias) if self.bias is not None else None)",
            "return F.linear(x.to(self.weight.dtype), self.weight, self.bias)",
            "test_timestep_layers_widen_what_they_are_given_and_what_they_have",
        ),
        (
            "LayerNorm computes in bfloat16",
            "return F.layer_norm(upcast(x), x.shape[-1:], weight, bias, self.eps)",
            "return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)",
            "test_layer_norm_computes_and_answers_in_float32",
        ),
        (
            "LayerNorm answers in bfloat16",
            "return F.layer_norm(upcast(x), x.shape[-1:], weight, bias, self.eps)",
            "return F.layer_norm(upcast(x), x.shape[-1:], weight, bias, self.eps).to(x.dtype)",
            "test_layer_norm_computes_and_answers_in_float32",
        ),
        (
            "LayerNorm's ε is 1e-5",
            "return F.layer_norm(upcast(x), x.shape[-1:], weight, bias, self.eps)",
            "return F.layer_norm(upcast(x), x.shape[-1:], weight, bias, 1e-5)",
            "test_every_epsilon_is_1e_6_and_stands_inside_of_the_root",
        ),
    ),
    *mutants(
        "precision",
        "kairos_train/model/timestep.py",
        "tests/unit/model/test_precision.py",
        (
            "sinusoids are taken in float32",
            "angles = timesteps.double().unsqueeze(-1) * frequencies",
            "angles = timesteps.float().unsqueeze(-1) * frequencies.float()",
            "test_sinusoids_are_taken_in_float64",
        ),
        (
            "sines come first",
            "torch.cat([angles.cos(), angles.sin()], dim=-1)",
            "torch.cat([angles.sin(), angles.cos()], dim=-1)",
            "test_sinusoids_are_taken_in_float64",
        ),
        (
            "frequencies reach their last exponent",
            "dtype=torch.float64, device=timesteps.device) / half)",
            "dtype=torch.float64, device=timesteps.device) / (half - 1))",
            "test_sinusoids_are_taken_in_float64",
        ),
        (
            "the first layer of the time embedding computes in bfloat16",
            "return nn.Sequential(UpcastLinear(freq_dim, dim), nn.SiLU(), UpcastLinear(dim, dim))",
            "return nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), UpcastLinear(dim, dim))",
            "test_both_streams_embed_their_timesteps_in_float32",
        ),
        (
            "the time projection computes in bfloat16",
            "return nn.Sequential(nn.SiLU(), UpcastLinear(dim, 6 * dim))",
            "return nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))",
            "test_both_streams_embed_their_timesteps_in_float32",
        ),
    ),
    *mutants(
        "precision",
        "kairos_train/model/streams.py",
        "tests/unit/model/test_precision.py",
        (
            "the sinusoid is rounded to bfloat16",
            "return timestep.sinusoid(times, freq_dim).to(wide(dtype_of(mlp)))",
            "return timestep.sinusoid(times, freq_dim).to(dtype_of(mlp))",
            "test_both_streams_embed_their_timesteps_in_float32",
        ),
        (
            "timesteps are rounded to bfloat16",
            "return timestep.sinusoid(times, freq_dim).to(wide(dtype_of(mlp)))",
            "return timestep.sinusoid(times.to(dtype_of(mlp)), freq_dim).to(wide(dtype_of(mlp)))",
            "test_both_streams_embed_their_timesteps_in_float32",
        ),
        (
            "the head modulates in bfloat16",
            "return self.head((self.norm(x) * (1 + scale) + shift).to(x.dtype))",
            "return self.head(self.norm(x).to(x.dtype) * (1 + scale).to(x.dtype) + shift.to(x.dtype))",
            "test_the_video_head_modulates_in_float32_shift_first",
        ),
        (
            "the head's modulation is added in bfloat16",
            "(upcast(self.modulation)[:, None] + time[:, :, None])",
            "(self.modulation[:, None] + time[:, :, None].to(self.modulation.dtype))",
            "test_the_video_head_modulates_in_float32_shift_first",
        ),
        (
            "the head takes its scale first",
            "shift, scale = (upcast(self.modulation)",
            "scale, shift = (upcast(self.modulation)",
            "test_the_video_head_modulates_in_float32_shift_first",
        ),
    ),
    *mutants(
        "precision",
        "kairos_train/model/block.py",
        "tests/unit/model/test_precision.py",
        (
            "modulations are added in bfloat16",
            "factors = (upcast(self.modulation)[:, None] + time)",
            "factors = (self.modulation[:, None] + time.to(self.modulation.dtype))",
            "test_a_block_modulates_and_gates_in_float32_and_rounds_once",
        ),
        (
            "norms are rounded before they are modulated",
            "return (x * (1 + scale) + shift).to(dtype)",
            "return x.to(dtype) * (1 + scale).to(dtype) + shift.to(dtype)",
            "test_a_block_modulates_and_gates_in_float32_and_rounds_once",
        ),
        (
            "attention is gated in bfloat16",
            "x = x + (gate * attended).to(x.dtype)",
            "x = x + gate.to(x.dtype) * attended",
            "test_a_block_modulates_and_gates_in_float32_and_rounds_once",
        ),
        (
            "the FFN is gated in bfloat16",
            "return x + (ffn_gate * self.ffn(hidden)).to(x.dtype)",
            "return x + ffn_gate.to(x.dtype) * self.ffn(hidden)",
            "test_a_block_modulates_and_gates_in_float32_and_rounds_once",
        ),
    ),
    *mutants(
        "precision",
        "kairos_train/model/kernels/attention.py",
        "tests/unit/model/test_precision.py",
        (
            "the norm of q and k multiplies in bfloat16",
            "return upcast(x) * torch.rsqrt(self.hooks.mean_square(x) + self.eps) * upcast(self.weight)",
            "return (x * torch.rsqrt(self.hooks.mean_square(x) + self.eps).to(x.dtype) * self.weight).float()",
            "test_the_norm_of_queries_and_keys_takes_its_mean_square_in_float32",
        ),
        (
            "q and k are rounded before they are turned",
            "q, k = self._heads(self.norm_q(self.q(x))), self._heads(self.norm_k(self.k(context)))",
            "q, k = (self._heads(y.to(x.dtype)) for y in (self.norm_q(self.q(x)), self.norm_k(self.k(context))))",
            "test_queries_and_keys_are_normed_and_turned_in_float32_and_rounded_once",
        ),
        (
            "the ε of q and k is 1e-5",
            "torch.rsqrt(self.hooks.mean_square(x) + self.eps)",
            "torch.rsqrt(self.hooks.mean_square(x) + 1e-5)",
            "test_every_epsilon_is_1e_6_and_stands_inside_of_the_root",
        ),
    ),
    *mutants(
        "precision",
        "kairos_train/model/hooks.py",
        "tests/unit/model/test_precision.py",
        (
            "the mean square of q and k is taken in bfloat16",
            "return upcast(x).pow(2).mean(-1, keepdim=True)",
            "return x.pow(2).mean(-1, keepdim=True)",
            "test_the_norm_of_queries_and_keys_takes_its_mean_square_in_float32",
        ),
    ),
    *mutants(
        "precision",
        "parallel/hooks.py",
        "tests/unit/model/test_precision.py",
        (
            "a layout takes the mean square of q and k in bfloat16",
            "x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x",
            "x = x.float() if x.dtype in (torch.float16,) else x",
            "test_the_norm_of_queries_and_keys_takes_its_mean_square_in_float32",
        ),
    ),
    *mutants(
        "precision",
        "kairos_train/model/kernels/rotary.py",
        "tests/unit/model/test_precision.py",
        (
            "rotary tables are taken of float32 angles",
            "return angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2)",
            "return angles.float().cos().to(dtype).unsqueeze(-2), angles.float().sin().to(dtype).unsqueeze(-2)",
            "test_rotary_tables_are_rounded_from_float64_to_float32_at_least",
        ),
    ),
    *mutants(
        "precision",
        "kairos_train/model/gated_delta_net.py",
        "tests/unit/model/test_precision.py",
        (
            "decays are taken in bfloat16",
            "return -upcast(self.A_log).exp() * F.softplus(upcast(self.a_proj(x)) + upcast(self.dt_bias))",
            "return -self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias)",
            "test_decays_write_strengths_and_unit_vectors_are_made_in_float32",
        ),
        (
            "decay rates are taken in bfloat16",
            "return -upcast(self.A_log).exp() *",
            "return -self.A_log.exp() *",
            "test_decays_write_strengths_and_unit_vectors_are_made_in_float32",
        ),
        (
            "decays add their bias in bfloat16",
            "F.softplus(upcast(self.a_proj(x)) + upcast(self.dt_bias))",
            "F.softplus(upcast(self.a_proj(x) + self.dt_bias))",
            "test_decays_write_strengths_and_unit_vectors_are_made_in_float32",
        ),
        (
            "write strengths are taken in bfloat16",
            "beta = upcast(self.b_proj(x)).sigmoid()",
            "beta = self.b_proj(x).sigmoid()",
            "test_decays_write_strengths_and_unit_vectors_are_made_in_float32",
        ),
        (
            "the output gate is taken in bfloat16",
            "gate = F.silu(upcast(self.g_proj(x)))",
            "gate = F.silu(self.g_proj(x))",
            "test_the_output_gate_and_norm_are_float32_and_rounded_once",
        ),
        (
            "the gated norm is rounded before the gate",
            "o = (self.o_norm(o) * gate).to(x.dtype)",
            "o = (self.o_norm(o).to(x.dtype) * gate).to(x.dtype)",
            "test_the_output_gate_and_norm_are_float32_and_rounded_once",
        ),
        (
            "the unit norm's ε is 1e-4",
            "return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)",
            "return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-4)",
            "test_every_epsilon_is_1e_6_and_stands_inside_of_the_root",
        ),
        (
            "the unit norm's ε stands outside of the root",
            "return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)",
            "return x / (x.pow(2).sum(-1, keepdim=True).sqrt() + 1e-6)",
            "test_every_epsilon_is_1e_6_and_stands_inside_of_the_root",
        ),
        (
            "the gated norm's ε is 1e-5",
            "torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)",
            "torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)",
            "test_every_epsilon_is_1e_6_and_stands_inside_of_the_root",
        ),
        (
            "the gated norm is not given the model's ε",
            "self.o_norm = RMSNorm(value_dim, eps)",
            "self.o_norm = RMSNorm(value_dim, 1e-5)",
            "test_every_norm_of_a_model_has_the_configured_epsilon",
        ),
        (
            "a_proj may be computed in FP8",
            "self.a_proj = hooks.column_linear(dim, heads, bias=False, high_precision=True)",
            "self.a_proj = hooks.column_linear(dim, heads, bias=False)",
            "tests/unit/parallel/test_fp8.py::test_in_the_model_the_large_products_of_the_chosen_blocks_are_in_fp8_and_nothing_else",
        ),
    ),
    *mutants(
        "precision",
        "kairos_train/model/kernels/delta_rule.py",
        "tests/unit/model/test_precision.py",
        (
            "the recurrence computes in bfloat16",
            "(_to_chunks(upcast(x), chunk) for x in",
            "(_to_chunks(x.to(out_dtype), chunk).float() for x in",
            "test_the_recurrence_computes_in_float32_between_bfloat16_inputs_and_outputs",
        ),
        (
            "the state is kept in bfloat16",
            "out.transpose(1, 2).to(out_dtype), state.unflatten(0, (batch, heads))",
            "out.transpose(1, 2).to(out_dtype), state.unflatten(0, (batch, heads)).to(out_dtype)",
            "test_the_recurrence_computes_in_float32_between_bfloat16_inputs_and_outputs",
        ),
        (
            "the initial state is rounded to bfloat16",
            "state = upcast(initial_state)",
            "state = upcast(initial_state.to(out_dtype))",
            "test_the_recurrence_computes_in_float32_between_bfloat16_inputs_and_outputs",
        ),
    ),
    *mutants(
        "precision",
        "parallel/exchange/state_passing.py",
        "tests/unit/model/test_precision.py",
        (
            "C = Pᵀ do is summed in bfloat16",
            "p, d = (t.transpose(1, 2).to(torch.promote_types(t.dtype, torch.float32)) for t in (reads, d_outputs))",
            "p, d = (t.transpose(1, 2) for t in (reads, d_outputs))",
            "test_the_gradient_of_a_state_is_summed_over_tokens_in_float32",
        ),
    ),
    *mutants(
        "precision",
        "kairos_train/model/lora.py",
        "tests/unit/model/test_lora.py",
        (
            "adapters are merged in bfloat16",
            "return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)",
            "return torch.addmm(weight, b, a, alpha=scale).float()",
            "test_merging_computes_in_float32_from_weights_of_any_type",
        ),
    ),
)


if __name__ == "__main__":
    raise SystemExit(main(MUTANTS))
