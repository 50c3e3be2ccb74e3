// The judge: the shares that it gives the ten classes for an image of grey values.
function classify(model, image) {
  const logits = run(model.layers, Float64Array.from(image, (grey) => grey / 255), 28);
  const most = Math.max(...logits);
  const weights = logits.map((logit) => Math.exp(logit - most));
  const total = weights.reduce((a, b) => a + b);
  return weights.map((weight) => weight / total);
}
