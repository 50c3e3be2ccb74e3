// The GAN: functions of code/gan.py by the same names, for one image. Numbers are Float64Arrays.

// Grey values as numbers in [-1, 1].
const scaled = (image) => Float64Array.from(image, (grey) => grey / 127.5 - 1);

// Noise to grey values, not rounded, by the generator's averaged weights.
const generated = (model, z) => run(model.average, z).map((value) => 127.5 * (value + 1));

// The logit of an image's being real.
const discriminate = (model, image) => run(model.discriminator, scaled(image))[0];
