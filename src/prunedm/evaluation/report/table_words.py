"""The Chinese of what other modules name in English: the table's columns and the conditions."""

# by Column.key: header, meaning
COLUMNS: dict[str, tuple[str, str]] = {
    "loss": ("去噪损失", "留出集去噪任务上的平均去噪损失 ± 标准误"),
    "fd": ("FD", "生成样本与留出图像在所注明特征空间中的 Fréchet 距离 ± 自助法标准误"),
    "kid": (
        "KID ×1000",
        "同一特征空间中的核距离（非 Inception 特征先除以其均方根），乘以 1000，± 标准误",
    ),
    "precision": ("精确率", "落在留出图像流形内的生成样本占比，反映保真度"),
    "recall": ("召回率", "落在生成样本流形内的留出图像占比，反映多样性"),
    "ssim": ("与稠密模型的 SSIM", "与稠密模型由同一噪声生成的图像的结构相似度，取中位数"),
    "psnr_db": (
        "与稠密模型的 PSNR",
        "与稠密模型由同一噪声生成的图像的峰值信噪比，取中位数，单位 dB",
    ),
    "params": ("参数量", "去噪网络的权重与偏置总数"),
    "nonzero": ("非零参数", "不为零的参数个数"),
    "sparsity": ("稀疏度", "模型自身参数中为零的占比；已移除的通道不计入"),
    "macs": ("MACs", "单张图像经去噪网络前向一次的乘加次数，含注意力"),
    "bytes_disk": ("磁盘占用", "去噪网络权重文件的大小"),
    "bytes_packed": (
        "打包后大小（fp16）",
        "按半精度存储的大小；带 N:M 掩码的层只存保留的权重，另加每个权重 1 比特的掩码",
    ),
    "compression": ("压缩比", "稠密模型打包后的字节数与本模型之比"),
    "latency_ms": ("延迟（ms）", "单次去噪网络前向的耗时：中位数 ± 四分位距的一半"),
    "peak_memory_mb": (
        "峰值内存/显存（MB）",
        "以所测的最大批大小执行单次去噪网络前向时的内存或显存峰值，含权重，单位 MB",
    ),
    "nm_valid": ("N:M", "带掩码的层中，每 M 个权重至多 N 个非零的分组占比"),
}

# by field of Conditions
CONDITIONS: dict[str, str] = {
    "dataset": "数据集",
    "problems": "去噪任务数",
    "samples": "样本数",
    "sampler": "采样器",
    "spacing": "时间步间隔",
    "seed": "随机种子",
    "features": "特征",
    "reference": "参考图像数",
    "device": "设备",
    "dtype": "数据类型",
    "threads": "线程数",
    "weights": "权重",
    "prediction": "预测目标",
    "schedule": "噪声调度",
    "latency_batch": "测速批大小",
    "latency_repeats": "测速次数",
}
