"""The report's own words in English and Simplified Chinese, and how both stand on one page.

Every word is written twice, as a pair of <span lang>; a rule of style shows one of them. What comes
from data (labels, layers, record fields, errors) has one form and is escaped.
"""

from typing import Any

from markupsafe import Markup, escape

LANGUAGES = ("en", "zh")
_TAGS = {"en": "en", "zh": "zh-CN"}

WORDS: dict[str, tuple[str, str]] = {
    # the frame of the page
    "language": ("Language", "语言"),
    "against": ("{last}, against {dense}", "{last}，以 {dense} 为基准"),
    "paired": (": the same problems, the same noise.", "：去噪任务相同，初始噪声也相同。"),
    "unpaired": (".", "。"),
    "alone": (
        "{label}, on its own: nothing to compare it with.",
        "只有 {label} 一个模型，没有可供对比的基准。",
    ),
    "figures": ("Figures", "指标"),
    "figures.label": ("Figures of every model", "各模型的指标"),
    "figures.note": (
        "Below each figure, its change to {dense}; in colour where it exceeds the two ± together.",
        "数值下方是相对 {dense} 的变化；超出两者 ± 之和时才着色。",
    ),
    "figures.identical": ("identical", "相同"),
    "columns": ("What the columns mean", "各列含义"),
    "model": ("model", "模型"),
    "lower": ("lower is better", "越低越好"),
    "higher": ("higher is better", "越高越好"),
    "differs": (
        "{label}: {name} is {value}, not {expected} as for {dense}; figures that depend on it do "
        "not compare.",
        "{label}：{name} 为 {value}，而 {dense} 为 {expected}；受此影响的指标不可直接比较。",
    ),
    "nm.share": ("{share} of {pattern}", "{pattern} 合规 {share}"),
    "nm.one": ("in {layers} layer", "共 {layers} 层"),
    "nm.many": ("in {layers} layers", "共 {layers} 层"),
    # checks
    "checks": ("Asked, got, and checked", "目标、实际与核验"),
    "checks.note": (
        "Loss against {dense} problem by problem, so that what all models find hard cancels out; in "
        "colour beyond two standard errors. Loaded again: the same output from the files on disk.",
        "损失差逐个去噪任务与 {dense} 配对计算，任务本身的难度相互抵消；超过两倍标准误时着色。"
        "重新加载：从磁盘文件再次读入后的输出是否一致。",
    ),
    "checks.asked": ("asked → got", "目标 → 实际"),
    "checks.loss": ("loss against dense, paired", "与稠密模型的配对损失差"),
    "checks.reload": ("loaded again", "重新加载"),
    "checks.reloads.True": ("same to the bit", "逐比特一致"),
    "checks.reloads.False": ("DIFFERS", "不一致"),
    # samples
    "samples": ("Samples", "生成样本"),
    "samples.note": (
        "{shown} of {all} samples. Images at the same place begin with the same noise.",
        "展示 {all} 张样本中的 {shown} 张；相同位置的图像由同一初始噪声生成。",
    ),
    "samples.alt": ("{count} samples of {label}", "{label} 的 {count} 张样本"),
    "viewer.choose": ("Model shown", "显示的模型"),
    "viewer.difference": ("difference to {dense} × 4", "与 {dense} 的差值 × 4"),
    "viewer.stage": ("Samples of the chosen model", "所选模型的样本"),
    "viewer.hint": (
        "Hold an image to see {dense} in its place, ← → change the model, a click enlarges.",
        "按住图像可切换到 {dense} 对照，按 ← → 切换模型，点击可放大。",
    ),
    "zoom.label": ("One sample, enlarged", "放大查看单张样本"),
    "zoom.difference": ("absolute difference × 4", "绝对差值 × 4"),
    "zoom.previous": ("previous sample", "上一张"),
    "zoom.next": ("next sample", "下一张"),
    "zoom.close": ("close", "关闭"),
    # quality against cost
    "front": ("Quality against cost", "质量与开销的权衡"),
    "front.note": (
        "{quality} over cost; nearer to the lower left corner is better. The line joins the models "
        "that no other beats in both (the Pareto front).",
        "纵轴：{quality}；横轴：开销。越靠左下角越好。折线连接在两项上都未被其他模型超越的模型"
        "（帕累托前沿）。",
    ),
    "front.latency_ms": ("latency, ms", "延迟（ms）"),
    "front.bytes_packed": ("packed size", "打包后大小"),
    "front.macs": ("MACs of an image", "单张图像的 MACs"),
    "front.alt": ("{quality} of every model over cost", "各模型的{quality}与开销"),
    # layers
    "layers": ("Sparsity of the layers", "逐层稀疏度"),
    "layers.note": (
        "A bar is as long as its layer has weights, and filled as far as they are not zero.",
        "条的长度对应该层的权重数，填充部分为非零权重的占比。",
    ),
    "layers.summary": (
        "{count} layers, {masked} with a mask; {share} of their weights are not zero",
        "共 {count} 层，其中 {masked} 层带掩码；非零权重占 {share}",
    ),
    "layers.valid": ("{share} of its groups are valid", "合规分组占 {share}"),
    "layers.nonzero": (
        "{nonzero} of {weights} weights are not zero",
        "{weights} 个权重中有 {nonzero} 个非零",
    ),
    "layers.dense": ("left dense: {reason}", "保持稠密：{reason}"),
    "left_dense": ("Layers left dense", "保持稠密的层"),
    "reason.multiple": (
        "{inputs} input channels are no multiple of {m}",
        "输入通道数 {inputs} 不是 {m} 的倍数",
    ),
    "reason.grouped convolution": ("grouped convolution", "分组卷积"),
    "reason.left dense": ("left dense", "未剪枝"),
    # timings
    "timings": ("Timings", "推理耗时"),
    "timings.note": (
        "One denoiser call; the median ± half the distance between the quartiles. Below it, the "
        "change to {dense} called in the same way.",
        "单次去噪网络前向的耗时：中位数 ± 四分位距的一半；下方为相同设置下相对 {dense} 的变化。",
    ),
    "timings.batch": ("batch", "批大小"),
    "timings.dtype": ("type", "数据类型"),
    "timings.threads": ("threads", "线程数"),
    "timings.mode": ("mode", "执行模式"),
    "timings.compiled": ("compiled", "compile 编译"),
    "timings.eager": ("eager", "eager 模式"),
    "timings.kernel": ("kernel", "算子实现"),
    "timings.median": ("time, ms", "耗时（ms）"),
    "timings.rate": ("images/s", "图像/秒"),
    # training
    "training": ("Training", "训练曲线"),
    "training.note": (
        "Loss over optimizer steps, every stage on one scale. Held-out losses of training may rest "
        "on other problems than the table's.",
        "横轴为优化步数，纵轴为损失，各阶段共用同一刻度。训练中的验证损失所用的去噪任务可能与上表不同。",
    ),
    "training.held_out": ("held-out loss", "验证损失"),
    "training.objective": (
        "training objective, smoothed (may include distillation)",
        "训练目标（已平滑，可能含蒸馏损失）",
    ),
    # stages
    "made": ("How they were made", "处理流程"),
    "made.total": ("{time} in {count} stages.", "共 {count} 个阶段，总用时 {time}。"),
    "made.no_record": ("No record: {labels}.", "没有流程记录：{labels}。"),
    "made.failed": ("failed", "失败"),
    "made.failed_at": ("{label} goes without it", "{label} 缺少这一步的结果"),
    "group.run": ("run", "运行信息"),
    "group.inputs": ("inputs", "输入"),
    "group.options": ("options", "选项"),
    "group.figures": ("figures", "结果"),
    "group.versions": ("versions", "软件版本"),
    "run.seed": ("seed", "随机种子"),
    "run.device": ("device", "设备"),
    "run.wall_time": ("wall time", "用时"),
    "run.created": ("created", "完成时间"),
    "none": ("none", "无"),
    "not_recorded": ("not recorded", "未记录"),
    "long": ("(long; whole in record.json)", "（内容较长，见 record.json）"),
    "stage.analyze": ("analyze", "分析"),
    "stage.compare": ("compare", "对比"),
    "stage.evaluate": ("evaluate", "评测"),
    "stage.export": ("export", "导出"),
    "stage.finetune": ("finetune", "微调"),
    "stage.learn": ("learn", "掩码学习"),
    "stage.loss": ("loss", "计算损失"),
    "stage.prune": ("prune", "剪枝"),
    "stage.sample": ("sample", "采样"),
    "stage.train": ("train", "训练"),
    "seconds": ("{s} s", "{s} 秒"),
    "minutes": ("{min} min {s} s", "{min} 分 {s} 秒"),
    "hours": ("{h} h {min} min", "{h} 小时 {min} 分"),
    # conditions
    "conditions": ("Conditions", "评测条件"),
    "conditions.loss": (
        "Loss: {problems} held-out denoising problems of {dataset}, drawn with seed {seed}; the "
        "same images, timesteps and noise for every model. The ± is one standard error.",
        "去噪损失：取自 {dataset} 留出集的 {problems} 个去噪任务，随机种子为 {seed}；所有模型使用"
        "相同的图像、时间步和噪声。± 为一倍标准误。",
    ),
    "conditions.fd": (
        "{features}: {samples} samples by {sampler} from seed {seed}, against {reference} held-out "
        "images. FD is biased at small n; it is comparable only at equal n and features.",
        "{features}：用 {sampler} 以随机种子 {seed} 生成 {samples} 张样本，与 {reference} 张留出图像"
        "比较。样本数较小时 FD 有偏，只有样本数和特征都相同时才可比较。",
    ),
    "conditions.psnr_db": (
        "PSNR: images of the same {samples} noises by {sampler}, against the dense model's; the "
        "median.",
        "PSNR：用 {sampler} 从相同的 {samples} 份初始噪声生成图像，与稠密模型逐张比较，取中位数。",
    ),
    "conditions.latency_ms": (
        "Latency: one denoiser call with a batch of {latency_batch} in {dtype} on {device}; the "
        "median, ± half the distance between the quartiles. Other work on the machine counts.",
        "延迟：在 {device} 上以 {dtype}、批大小 {latency_batch} 执行一次去噪网络前向；取中位数，"
        "± 为四分位距的一半。同机的其他任务会影响结果。",
    ),
    "conditions.disturbed": (
        "Other processes used {others} of the processor meanwhile: these times are too long.",
        "测速期间其他进程占用了 {others} 的处理器：所列耗时偏长。",
    ),
    "conditions.size": (
        "Packed: weights in half precision; layers with N:M masks as their kept values and one bit "
        "a weight. MACs: of one image through the denoiser once, attention included.",
        "打包后大小：权重按半精度计；带 N:M 掩码的层只存保留的权重，另加每个权重 1 比特的掩码。"
        "MACs：单张图像经去噪网络前向一次的乘加次数，含注意力。",
    ),
    "conditions.device": (
        "Device: {device}. Type: {dtype}.",
        "设备：{device}；数据类型：{dtype}。",
    ),
    "conditions.threads": ("Threads: {threads}.", "线程数：{threads}。"),
    "conditions.model": (
        "The denoiser predicts: {prediction}. Noise schedule: {schedule}.",
        "去噪网络的预测目标：{prediction}；噪声调度：{schedule}。",
    ),
    "conditions.weights.ema": (
        "Weights of {labels}: an average over training (EMA), decay {decay}.",
        "{labels} 的权重：训练过程的指数滑动平均（EMA），衰减系数 {decay}。",
    ),
    "conditions.weights.last": (
        "Weights of {labels}: those of the last training step, not averaged.",
        "{labels} 的权重：训练最后一步的权重，未做平均（EMA）。",
    ),
    "conditions.spacing": (
        "Timesteps of {sampler}: {spacing} spacing.",
        "{sampler} 的时间步间隔方式：{spacing}。",
    ),
    "conditions.missing": ("Not measured: {english}.", "未测量：{chinese}。"),
}


def text(key: str, **values: Any) -> Markup:
    """The words of `key` in both languages, filled with escaped `values`."""
    english, chinese = WORDS[key]
    return both(Markup(english).format(**values), Markup(chinese).format(**values))


def both(english: Any, chinese: Any) -> Markup:
    """A pair of spans, one for each language; what is no markup is escaped."""
    spans = zip(LANGUAGES, (english, chinese), strict=True)
    return Markup("").join(
        Markup('<span lang="{}">{}</span>').format(_TAGS[language], words)
        for language, words in spans
    )


def attribute(name: str, key: str, **values: Any) -> Markup:
    """`name="..."` in English, with both languages beside it for the page's script."""
    english, chinese = (escape(words.format(**values)) for words in WORDS[key])
    return Markup('{0}="{1}" data-en-{0}="{1}" data-zh-{0}="{2}"').format(name, english, chinese)


def plain(key: str, **values: Any) -> dict[str, str]:
    """The words of `key` by language, not escaped."""
    words = (words.format(**values) for words in WORDS[key])
    return dict(zip(LANGUAGES, words, strict=True))
