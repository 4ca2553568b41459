#include "tests/unit/model/transformer_reference.h"

#include <cmath>
#include <functional>
#include <string>

#include "model/host_floats.h"

namespace slalom {
namespace {

using Vec = std::vector<double>;

struct Matrix {
  int rows = 0;
  int columns = 0;
  Vec values;

  Matrix(int rows, int columns)
      : rows(rows), columns(columns), values(static_cast<std::size_t>(rows) * columns) {}
  double& operator()(int r, int c) { return values[static_cast<std::size_t>(r) * columns + c]; }
  double operator()(int r, int c) const {
    return values[static_cast<std::size_t>(r) * columns + c];
  }
};

class Reference {
 public:
  Reference(const Weights& weights, const TransformerConfig& config)
      : weights_(weights), config_(config), d_(config.dim()) {}

  Vec Run(const Vec& latent, int frames, int height, int width, double timestep, const Vec& text) {
    frames_ = frames;
    h_ = height / 2;
    w_ = width / 2;
    Matrix x = PatchEmbedding(latent, height, width);

    Matrix wave(1, config_.freq_dim);
    const int half = config_.freq_dim / 2;
    for (int j = 0; j < half; ++j) {
      const double angle = timestep * std::pow(10000.0, -static_cast<double>(j) / half);
      wave(0, j) = std::cos(angle);
      wave(0, half + j) = std::sin(angle);
    }
    const std::string embedder = "condition_embedder.";
    const Matrix temb = Linear(Map(Linear(wave, embedder + "time_embedder.linear_1"), Silu),
                               embedder + "time_embedder.linear_2");
    const Matrix projected = Linear(Map(temb, Silu), embedder + "time_proj");

    Matrix padded(config_.text_len, config_.text_dim);
    std::copy(text.begin(), text.end(), padded.values.begin());
    const Matrix c = Linear(Map(Linear(padded, embedder + "text_embedder.linear_1"), Gelu),
                            embedder + "text_embedder.linear_2");
    for (int i = 0; i < config_.num_layers; ++i) Block(i, projected, c, x);

    const Vec table = Get("scale_shift_table");
    Matrix u = Normalise(x);
    for (int t = 0; t < u.rows; ++t) {
      for (int k = 0; k < d_; ++k) {
        u(t, k) = u(t, k) * (1 + table[d_ + k] + temb(0, k)) + table[k] + temb(0, k);
      }
    }
    return Unpatchify(Linear(u, "proj_out"), height, width);
  }

 private:
  static double Silu(double x) { return x / (1 + std::exp(-x)); }
  static double Gelu(double x) {
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
  }
  static Matrix Map(Matrix m, double (*f)(double)) {
    for (double& value : m.values) value = f(value);
    return m;
  }

  Vec Get(const std::string& name) const {
    const std::vector<float> floats = ToFloats(weights_.Get(name));
    return {floats.begin(), floats.end()};
  }

  Matrix Linear(const Matrix& x, const std::string& name) const {
    const Vec weight = Get(name + ".weight");
    const Vec bias = Get(name + ".bias");
    Matrix y(x.rows, static_cast<int>(bias.size()));
    for (int r = 0; r < y.rows; ++r) {
      for (int n = 0; n < y.columns; ++n) {
        double sum = bias[static_cast<std::size_t>(n)];
        for (int k = 0; k < x.columns; ++k) {
          sum += x(r, k) * weight[static_cast<std::size_t>(n) * x.columns + k];
        }
        y(r, n) = sum;
      }
    }
    return y;
  }

  // LayerNorm without weights.
  Matrix Normalise(const Matrix& x) const {
    Matrix y = x;
    for (int r = 0; r < x.rows; ++r) {
      double mean = 0;
      double variance = 0;
      for (int k = 0; k < x.columns; ++k) mean += x(r, k) / x.columns;
      for (int k = 0; k < x.columns; ++k) variance += std::pow(x(r, k) - mean, 2) / x.columns;
      for (int k = 0; k < x.columns; ++k) {
        y(r, k) = (x(r, k) - mean) / std::sqrt(variance + config_.eps);
      }
    }
    return y;
  }

  Matrix RmsNorm(Matrix x, const std::string& name) const {
    const Vec weight = Get(name + ".weight");
    for (int r = 0; r < x.rows; ++r) {
      double squares = 0;
      for (int k = 0; k < x.columns; ++k) squares += x(r, k) * x(r, k) / x.columns;
      for (int k = 0; k < x.columns; ++k) {
        x(r, k) *= weight[static_cast<std::size_t>(k)] / std::sqrt(squares + config_.eps);
      }
    }
    return x;
  }

  // Turns pair p of every head by the angle of its axis.
  void Rotate(Matrix& x) const {
    const int head_dim = config_.attention_head_dim;
    const int side = 2 * (head_dim / 6);
    const int time = head_dim - 2 * side;
    for (int token = 0; token < x.rows; ++token) {
      const int t = token / (h_ * w_);
      const int row = token / w_ % h_;
      const int column = token % w_;
      for (int p = 0; p < head_dim / 2; ++p) {
        int position = t;
        int j = p;
        int width = time;
        if (p >= time / 2 + side / 2) {
          position = column;
          j = p - time / 2 - side / 2;
          width = side;
        } else if (p >= time / 2) {
          position = row;
          j = p - time / 2;
          width = side;
        }
        const double angle = position * std::pow(10000.0, -2.0 * j / width);
        for (int head = 0; head < config_.num_attention_heads; ++head) {
          double& even = x(token, head * head_dim + 2 * p);
          double& odd = x(token, head * head_dim + 2 * p + 1);
          const double e = even * std::cos(angle) - odd * std::sin(angle);
          odd = even * std::sin(angle) + odd * std::cos(angle);
          even = e;
        }
      }
    }
  }

  Matrix Attend(const Matrix& q, const Matrix& k, const Matrix& v) const {
    const int head_dim = config_.attention_head_dim;
    Matrix out(q.rows, d_);
    for (int head = 0; head < config_.num_attention_heads; ++head) {
      for (int i = 0; i < q.rows; ++i) {
        Vec weight(static_cast<std::size_t>(k.rows));
        double total = 0;
        for (int j = 0; j < k.rows; ++j) {
          double score = 0;
          for (int c = 0; c < head_dim; ++c) {
            score += q(i, head * head_dim + c) * k(j, head * head_dim + c);
          }
          weight[static_cast<std::size_t>(j)] = std::exp(score / std::sqrt(head_dim));
          total += weight[static_cast<std::size_t>(j)];
        }
        for (int j = 0; j < k.rows; ++j) {
          for (int c = 0; c < head_dim; ++c) {
            out(i, head * head_dim + c) +=
                weight[static_cast<std::size_t>(j)] / total * v(j, head * head_dim + c);
          }
        }
      }
    }
    return out;
  }

  void Block(int index, const Matrix& projected, const Matrix& text, Matrix& x) const {
    const std::string block = "blocks." + std::to_string(index) + ".";
    const Vec table = Get(block + "scale_shift_table");
    const auto row = [&](int r, int k) {
      return table[static_cast<std::size_t>(r * d_ + k)] + projected(0, r * d_ + k);
    };
    const auto modulate = [&](int shift, int scale) {
      Matrix u = Normalise(x);
      for (int t = 0; t < u.rows; ++t) {
        for (int k = 0; k < d_; ++k) u(t, k) = u(t, k) * (1 + row(scale, k)) + row(shift, k);
      }
      return u;
    };
    const auto add = [&](const Matrix& y, const std::function<double(int)>& gate) {
      for (int t = 0; t < x.rows; ++t) {
        for (int k = 0; k < d_; ++k) x(t, k) += gate(k) * y(t, k);
      }
    };

    Matrix u = modulate(0, 1);
    Matrix q = RmsNorm(Linear(u, block + "attn1.to_q"), block + "attn1.norm_q");
    Matrix k = RmsNorm(Linear(u, block + "attn1.to_k"), block + "attn1.norm_k");
    Rotate(q);
    Rotate(k);
    add(Linear(Attend(q, k, Linear(u, block + "attn1.to_v")), block + "attn1.to_out.0"),
        [&](int c) { return row(2, c); });

    u = Normalise(x);
    const Vec weight = Get(block + "norm2.weight");
    const Vec bias = Get(block + "norm2.bias");
    for (int t = 0; t < u.rows; ++t) {
      for (int c = 0; c < d_; ++c) {
        u(t, c) = u(t, c) * weight[static_cast<std::size_t>(c)] + bias[static_cast<std::size_t>(c)];
      }
    }
    q = RmsNorm(Linear(u, block + "attn2.to_q"), block + "attn2.norm_q");
    k = RmsNorm(Linear(text, block + "attn2.to_k"), block + "attn2.norm_k");
    add(Linear(Attend(q, k, Linear(text, block + "attn2.to_v")), block + "attn2.to_out.0"),
        [](int) { return 1.0; });

    u = modulate(3, 4);
    add(Linear(Map(Linear(u, block + "ffn.net.0.proj"), Gelu), block + "ffn.net.2"),
        [&](int c) { return row(5, c); });
  }

  // A convolution whose kernel and stride are 1 x 2 x 2.
  Matrix PatchEmbedding(const Vec& latent, int height, int width) const {
    const Vec weight = Get("patch_embedding.weight");
    const Vec bias = Get("patch_embedding.bias");
    const int channels = config_.in_channels;
    Matrix x(frames_ * h_ * w_, d_);
    for (int token = 0; token < x.rows; ++token) {
      const int t = token / (h_ * w_);
      const int y = token / w_ % h_;
      const int column = token % w_;
      for (int k = 0; k < d_; ++k) {
        double sum = bias[static_cast<std::size_t>(k)];
        for (int c = 0; c < channels; ++c) {
          for (int ky = 0; ky < 2; ++ky) {
            for (int kx = 0; kx < 2; ++kx) {
              const int at = ((c * frames_ + t) * height + 2 * y + ky) * width + 2 * column + kx;
              sum += latent[static_cast<std::size_t>(at)] *
                     weight[static_cast<std::size_t>(((k * channels + c) * 2 + ky) * 2 + kx)];
            }
          }
        }
        x(token, k) = sum;
      }
    }
    return x;
  }

  Vec Unpatchify(const Matrix& patches, int height, int width) const {
    const int channels = config_.out_channels;
    Vec out(static_cast<std::size_t>(channels * frames_ * height * width));
    for (int token = 0; token < patches.rows; ++token) {
      const int t = token / (h_ * w_);
      const int y = token / w_ % h_;
      const int column = token % w_;
      for (int ky = 0; ky < 2; ++ky) {
        for (int kx = 0; kx < 2; ++kx) {
          for (int c = 0; c < channels; ++c) {
            const int at = ((c * frames_ + t) * height + 2 * y + ky) * width + 2 * column + kx;
            out[static_cast<std::size_t>(at)] = patches(token, (ky * 2 + kx) * channels + c);
          }
        }
      }
    }
    return out;
  }

  const Weights& weights_;
  const TransformerConfig& config_;
  const int d_;
  int frames_ = 0;
  int h_ = 0;
  int w_ = 0;
};

}  // namespace

std::vector<double> ReferenceTransformer(const Weights& weights, const TransformerConfig& config,
                                         const std::vector<double>& latent, int frames, int height,
                                         int width, double timestep,
                                         const std::vector<double>& text) {
  return Reference(weights, config).Run(latent, frames, height, width, timestep, text);
}

}  // namespace slalom
